"""Loki (Singhania et al., 2024, algorithm 1): scores from the first dimensions of a calibrated basis.

With `basis="pca"` keys are kept rotated into the principal components of the calibration keys: the components are
orthonormal, so dot products with rotated queries are unchanged, and scores take the first `rank` dimensions of the keys
that are kept anyway. With `basis="score"` (SVD of Σq^{1/2} Σk^{1/2}, see `calibrate/score_basis.py`) the maps are not
orthonormal, so keys stay as they are and their projections are kept beside them. Both are applied after the rotary
embedding, whichever `stage` they were fitted on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...artifacts import Artifact, KvcalError
from ...kernels.backend import choose as backend
from ...kernels.scan import Tables, Tokens
from ...kernels.score import score
from ..attention import SoftmaxSpec
from ..kv.pages import LayerCache
from .amounts import Amount, check_choice, check_count
from .base import Attended, Method, Policy, Reading, Widths
from .basis import UPTRAIN, Basis
from .choosing import Counts, Sampling, attend_selected, choose
from .full import attend_all
from .scanning import Scan

BASES = ("pca", "score")
STAGES = ("pre", "post")


@dataclass(frozen=True)
class Loki(Sampling, Method):
    in_numba = True
    shared_defaults = {"basis": "pca"}  # noqa: RUF012 (the type is the base's)
    planning_bases = tuple(
        {"rank": 0.25, "keep": 1 / 16, "select": "group", "basis": basis, "stage": stage}
        for basis in reversed(BASES)
        for stage in reversed(STAGES)
    )
    rank: Amount | str = 0.25
    """Dimensions that are scored: a fraction, a count, or "variance:0.9", the fewest that hold 90 % of what
    the basis is ordered by, in every KV head of the layer."""
    stage: str = "post"
    """Whether the basis was fitted on keys before ("pre") or after ("post") their rotary embedding."""
    basis: str = "score"
    """"score", or "pca" as published, which misses attention sinks unless it was calibrated with `--uncentred`
    (docs/results/real.md)."""
    sinks: int = 1
    """First tokens, always read."""
    recent: int = 16
    """Last tokens, always read; lowered, to no less than 1, where with the sinks they exceed half of `keep`."""

    def check(self) -> None:
        super().check()
        check_choice("stage", self.stage, STAGES)
        check_choice("basis", self.basis, BASES)
        check_count("sinks", self.sinks)
        check_count("recent", self.recent)

    @classmethod
    def planning_grid(cls, head_dim: int, keeps: Sequence[float]) -> list[dict[str, Any]]:
        ranks = (0.0625, 0.125, 0.25, 0.5)
        return [{"rank": rank, "keep": keep, "select": "group"} for rank in ranks for keep in keeps]

    def captured_at(self, longest: int) -> bool:
        return self.not_captured() is None and self.is_scan(longest)

    def not_shared(self) -> str | None:
        if self.basis == "pca":
            return None
        return "basis 'score' is fitted to the queries of one layer: take basis='pca'"

    def check_changed_keys(self, layer: int, bases: Mapping[str, Tensor]) -> None:
        if f"layers.{layer}.key_{self.stage}.components" not in bases:
            raise KvcalError(f"loki needs a basis of the keys as shared in layer {layer}: make it with {UPTRAIN}")

    def bind(self, layer: int, head_dim: int, artifact: Artifact | None) -> LokiPolicy:
        self.check()
        if artifact is None:
            raise KvcalError("loki needs an artifact: make one with `calibrate pca` and pass it")
        return LokiPolicy(self, Basis.load(artifact, layer, self.rank, stage=self.stage, basis=self.basis))


class LokiPolicy(Policy):
    def __init__(self, settings: Loki, basis: Basis):
        self.settings, self.basis = settings, basis
        self._scanned: dict[torch.device, Tables] = {}
        self.rotates = settings.basis == "pca"
        self.keeps_keys_values = not self.rotates
        heads, _, dims = basis.key_map.shape
        self.fitted_to = heads, dims, None

    def on_heads(self, heads: slice) -> LokiPolicy:
        return LokiPolicy(self.settings, self.basis.on_heads(heads))

    def encode(self, key: Tensor, value: Tensor) -> Mapping[str, Tensor]:
        """With `basis="score"` also "projected" [B, Hkv, T, r]: the dimensions of a key that are scored."""
        projected = key @ self.basis.maps(key)[1].mT
        if self.rotates:
            return {"key": projected, "value": value}
        return {"key": key, "value": value, "projected": projected}

    def query(self, query: Tensor) -> Tensor:
        if not self.rotates:
            return query
        query_map, _ = self.basis.maps(query)
        return (query.unflatten(1, (query_map.shape[0], -1)) @ query_map.mT.unsqueeze(1)).flatten(1, 2)

    def step(self, query: Tensor, cache: LayerCache, spec: SoftmaxSpec) -> Attended:
        settings, metadata = self.settings, cache.metadata
        counts = metadata.once(
            (settings, type(settings.keep)), lambda: Counts.of(settings, metadata, settings.sinks, settings.recent)
        )
        query, sample = self.query(query), settings.sample if settings.choice == "sampled" else 0
        if counts is None:
            return Attended(attend_all(self, query, cache, spec), None)
        scan = Scan.of(cache, lambda: self._scan(cache))
        if scan is not None and (found := scan.step(query, cache, counts, settings.select, sample, spec)):
            return found
        scores = self._scores(query, cache, spec)
        if counts.has_always:
            scores = scores.masked_fill(~counts.candidate, -torch.inf)
        selected = choose(scores, counts, settings.select, sample)
        return Attended(attend_selected(query, cache, selected, spec), selected)

    def _scan(self, cache: LayerCache) -> Scan:
        reduced = cache.part("key" if self.rotates else "projected")
        held = Tokens(cache.part("key"), cache.part("value"), reduced)
        device = reduced.device
        if device not in self._scanned:  # where a captured step finds what was made of them, whatever buffers do
            query_map = self.basis.maps(torch.empty(0, device=device))[0].mT
            if self.rotates:  # keys and queries lie in the basis, whose first dimensions are scored
                query_map = torch.eye(*query_map.shape[1:], device=device).expand_as(query_map)
            self._scanned[device] = Tables(query_map[..., : self.basis.rank].float().contiguous())
        return Scan(held, self._scanned[device])

    def _scores(self, query: Tensor, cache: LayerCache, spec: SoftmaxSpec) -> Tensor:
        """[B, Hkv, G, S] float32: logits from the first dimensions of the basis, -inf beyond a sequence's tokens."""
        rank, name, metadata = self.basis.rank, "key" if self.rotates else "projected", cache.metadata
        part = query.squeeze(2).unflatten(1, (cache.heads, -1))
        part = part[..., :rank] if self.rotates else part @ self.basis.maps(query)[0].mT
        if backend("auto", part) == "triton":
            lengths, table = metadata.seq_lens, metadata.table
            projected = (cache.tokens(name) if table is None else cache.part(name))[..., :rank]
            found = score(
                part.contiguous(), projected, lengths, scaling=spec.scaling, softcap=spec.softcap, table=table
            )
            return found[..., : metadata.longest]
        scores, valid = spec.logits(part @ cache.tokens(name)[..., :rank].mT), metadata.valid()
        return scores if valid is None else scores.masked_fill(~valid[:, None, None], -torch.inf)

    def selection_bytes(self, reading: Reading) -> int:
        width = reading.widths["key"] // self.basis.key_map.shape[-1] * self.basis.rank
        return reading.tokens() * reading.heads * width

    def shared_bytes(self, widths: Widths) -> int:
        """With "pca" one map, for the query and the new key alike; with "score" two."""
        heads, _, dims = self.basis.key_map.shape
        return heads * widths["key"] * (dims if self.rotates else 2 * self.basis.rank)

    def dense_bytes(self, reading: Reading) -> int:
        return super().dense_bytes(reading) + (self.shared_bytes(reading.widths) if self.rotates else 0)
