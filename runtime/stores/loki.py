"""Loki (Singhania et al., 2024, algorithm 1): scores from the first dimensions of a calibrated basis.

With `basis="pca"` keys are stored rotated into the principal components of the calibration keys: the
components are orthonormal, so dot products with rotated queries are unchanged, and the index is the
first `rank` dimensions of what is stored anyway. With `basis="score"` (SVD of Σq^{1/2} Σk^{1/2}, see
`calibrate/score_basis.py`) the maps are not orthonormal, so keys stay as they are and the index is a tensor
of its own. Both are applied after the rotary embedding, whichever `stage` they were fitted on.

With `choice="threshold"` (ours) a step reads the tokens whose score reaches a calibrated threshold (`thresholds.py`),
which takes no look at the other scores: from three quarters of the budget to half as many again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...artifacts import Artifact, KvcalError
from ...kernels.select import select_threshold
from ..attention import Logits
from ..kv.buffers import Places, TokenBuffer
from .amounts import Amount, check_choice
from .basis import Basis
from .clustered import Clustered, ClusteredStore
from .saved import FLOATS, Saved, require_close
from .selecting import Chosen
from .thresholds import Thresholds, bounds, fit_layer, room


@dataclass(frozen=True)
class Loki(Clustered):
    rank: Amount | str = 0.25
    """Dimensions that are scored: a fraction, a count, or "variance:0.9", the fewest that hold 90 % of what
    the basis is ordered by, in every KV head of the layer."""
    stage: str = "post"
    """Keys before ("pre") or after ("post") their rotary embedding were what the basis was fitted on."""
    basis: str = "score"
    """"score", or "pca" as published, which misses attention sinks unless it was calibrated with `--uncentred`
    (docs/results/real.md)."""
    choice: str = "exact"
    """"exact": the highest scores, as many as `keep` says. "threshold": what reaches a calibrated threshold, about as
    many on average. It needs the artifact's reservoir, and scores that need no second look: `select` head or max."""

    def check(self) -> None:
        super().check()
        check_choice("choice", self.choice, ("exact", "threshold"))
        if self.choice == "threshold" and self.select == "group":
            raise KvcalError(
                "choice 'threshold' with select 'group': a mean of softmaxes is known only when all scores are; "
                "take select 'max' or 'head'"
            )

    def build(self, layer: int, head_dim: int, artifact: Artifact | None) -> Callable[[], LokiStore]:
        self.check()
        check_choice("stage", self.stage, ("pre", "post"))
        check_choice("basis", self.basis, ("pca", "score"))
        if artifact is None:
            raise KvcalError("loki needs an artifact: make one with `calibrate pca` and pass it")
        basis = Basis.load(artifact, layer, self.rank, stage=self.stage, basis=self.basis)
        exact = self.choice == "exact"
        thresholds = None if exact else fit_layer(artifact, layer, basis, by_group=self.select == "max")
        return lambda: LokiStore(self, basis, thresholds)


class LokiStore(ClusteredStore):
    selection: Loki

    def __init__(self, settings: Loki, basis: Basis, thresholds: Thresholds | None = None):
        super().__init__(settings)
        self.basis, self.thresholds = basis, thresholds
        self.rotates = settings.basis == "pca"

    def _score(self, query: Tensor, logits: Logits) -> Tensor:
        query_map, _ = self.basis.maps(query)
        query_map = query_map[:, : self.basis.rank]
        index = self.rows["key" if self.rotates else "index"].view[..., : self.basis.rank]
        # The rotation of the query for the exact part is counted with its keys, in `_encode_query`'s bytes.
        self._read += index.nbytes + self.shared_bytes()
        self._asked = (query @ query_map.mT, logits)
        return self._masked(logits.of(self._asked[0] @ index.mT))

    def _choose(self, scores: Tensor, budgets: list[int]) -> Chosen:
        if self.thresholds is None:
            return super()._choose(scores, budgets)
        wanted, seen = (torch.tensor(of, dtype=torch.int32, device=scores.device) for of in (budgets, self.lengths))
        threshold = self.thresholds.of(self._asked[0], wanted, seen, self._asked[1]).flatten(1)
        self._read += self.thresholds.bytes_read(self.lengths)
        least, most = bounds(wanted, seen)
        slots = room(max(budgets), scores.shape[-1])
        index, count = select_threshold(scores.flatten(1, 2), threshold, seen, slots, least=least, most=most)
        index, count = (each.unflatten(1, scores.shape[1:3]) for each in (index, count))
        taken = max(1, int(count.max()))
        counted = torch.arange(taken, device=scores.device) < count.unsqueeze(-1)
        return Chosen(index[..., :taken].long(), counted)

    def _gather(self, names: Sequence[str], chosen: Chosen) -> list[Tensor]:
        before = self._read
        gathered = super()._gather(names, chosen)
        if self.thresholds is not None and chosen.counted is not None:  # heads choose different numbers of tokens
            self._read = before + round((self._read - before) * float(chosen.counted.float().mean()))
        return gathered

    def _extended(self, key: Tensor, value: Tensor, places: Places) -> None:
        if not self.rotates:
            self.rows.setdefault("index", TokenBuffer()).write(key @ self.basis.maps(key)[1].mT, places)

    def _forget(self) -> None:
        super()._forget()
        if not self.rotates:
            self.rows["index"].used = max(self.lengths)

    def _encode_key(self, key: Tensor) -> Tensor:
        return key @ self.basis.maps(key)[1].mT if self.rotates else key

    def _encode_query(self, query: Tensor) -> Tensor:
        if not self.rotates:
            return query
        query_map, _ = self.basis.maps(query)
        return (query.unflatten(1, (query_map.shape[0], -1)) @ query_map.mT.unsqueeze(1)).flatten(1, 2)

    def _check(self, saved: Saved) -> None:
        super()._check(saved)
        key, (heads, _, dims) = saved.key, self.basis.key_map.shape
        saved.take("rows.key", FLOATS, None, heads, None, dims)
        if not self.rotates:
            index = saved.take("rows.index", key.dtype, *key.shape[:3], self.basis.rank)
            wanted = key.float() @ self.basis.maps(key)[1].float().mT
            require_close("rows.index", index * saved.held, wanted * saved.held, key.dtype)

    def shared_bytes(self) -> int:
        query_map, _ = self.basis.maps(self.rows["key"].view)
        return self._encoding_bytes() if self.rotates else 2 * query_map[:, : self.basis.rank].nbytes

    def _encoding_bytes(self) -> int:
        """One map for the query and the new key alike, read once per step."""
        return self.basis.maps(self.rows["key"].view)[0].nbytes if self.rotates else 0
