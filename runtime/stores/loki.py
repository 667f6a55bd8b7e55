"""Loki (Singhania et al., 2024, algorithm 1): scores from the first dimensions of a calibrated basis.

With `basis="pca"` keys are stored rotated into the principal components of the calibration keys: the
components are orthonormal, so dot products with rotated queries are unchanged, and the index is the
first `rank` dimensions of what is stored anyway. With `basis="score"` (SVD of Σq^{1/2} Σk^{1/2}, see
`calibrate/score_basis.py`) the maps are not orthonormal, so keys stay as they are and the index is a tensor
of its own. Both are applied after the rotary embedding, whichever `stage` they were fitted on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...artifacts import Artifact, KvcalError
from ..attention import Logits
from .amounts import Amount, check_amount, check_choice, count_of
from .clustered import Clustered, ClusteredStore
from .rows import Places, Rows


@dataclass(frozen=True)
class Loki(Clustered):
    rank: Amount | str = 0.25
    """Dimensions that are scored: a fraction, a count, or "variance:0.9", the fewest that hold 90 % of what
    the basis is ordered by, in every KV head of the layer."""
    stage: str = "post"
    """Keys before ("pre") or after ("post") their rotary embedding were what the basis was fitted on."""
    basis: str = "pca"
    """"pca" or "score"."""

    def build(self, layer: int, head_dim: int, artifact: Artifact | None) -> Callable[[], LokiStore]:
        self.check()
        check_choice("stage", self.stage, ("pre", "post"))
        check_choice("basis", self.basis, ("pca", "score"))
        if artifact is None:
            raise KvcalError("loki needs an artifact: make one with `calibrate pca` and pass it")
        basis = Basis.load(artifact, layer, self)
        return lambda: LokiStore(self, basis)


class Basis:
    """Two maps [Hkv, r, D] whose products with queries and keys give the scores; one object for all caches."""

    def __init__(self, query_map: Tensor, key_map: Tensor, rank: int):
        self.rank = rank
        self._maps = {(torch.device("cpu"), torch.float32): (query_map, key_map)}

    @classmethod
    def load(cls, artifact: Artifact, layer: int, settings: Loki) -> Basis:
        if settings.basis == "pca":
            components = artifact.tensor("pca", layer, f"key_{settings.stage}.components")
            ordered_by = "eigenvalues" if artifact.settings.get("centred", True) else "eigenvalues_uncentred"
            spectrum = artifact.tensor("pca", layer, f"key_{settings.stage}.{ordered_by}")
            return cls(components, components, _rank(settings.rank, spectrum))
        query_map, key_map = (
            artifact.tensor("score", layer, f"{settings.stage}.{name}_map") for name in ("query", "key")
        )
        spectrum = artifact.tensor("score", layer, f"{settings.stage}.singular_values") ** 2
        rank = _rank(settings.rank, spectrum)
        return cls(query_map[:, :rank].contiguous(), key_map[:, :rank].contiguous(), rank)

    def maps(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """(query map, key map) on the device and in the dtype of `like`."""
        place = (like.device, like.dtype)
        if place not in self._maps:
            first = next(iter(self._maps.values()))
            self._maps[place] = (first[0].to(like), first[1].to(like))
        return self._maps[place]


class LokiStore(ClusteredStore):
    selection: Loki

    def __init__(self, settings: Loki, basis: Basis):
        super().__init__(settings)
        self.basis = basis
        self.rotates = settings.basis == "pca"

    def _score(self, query: Tensor, logits: Logits) -> Tensor:
        query_map, _ = self.basis.maps(query)
        query_map = query_map[:, : self.basis.rank]
        index = self.rows["key" if self.rotates else "index"].view[..., : self.basis.rank]
        # The rotation of the query for the exact part is counted with its keys, in `_encode_query`'s bytes.
        self._read += index.nbytes + (self._encoding_bytes() if self.rotates else 2 * query_map.nbytes)
        return self._masked(logits.of((query @ query_map.mT) @ index.mT))

    def _extended(self, key: Tensor, value: Tensor, places: Places) -> None:
        if not self.rotates:
            self.rows.setdefault("index", Rows()).write(key @ self.basis.maps(key)[1].mT, places)

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

    def _encoding_bytes(self) -> int:
        """One map for the query and the new key alike, read once per step."""
        return self.basis.maps(self.rows["key"].view)[0].nbytes if self.rotates else 0


def _rank(rank: Amount | str, spectrum: Tensor) -> int:
    """Args: spectrum: [Hkv, D], descending, what each dimension of the basis holds."""
    dims = spectrum.shape[-1]
    if not isinstance(rank, str):
        check_amount("rank", rank, dims, "the head dim")
        return count_of(rank, dims)
    kind, _, target = rank.partition(":")
    try:
        share = float(target)
    except ValueError:
        share = 0.0
    if kind != "variance" or not 0 < share <= 1:
        raise KvcalError(f'rank {rank!r}: give a fraction, a count, or "variance:0.9"')
    cumulative = spectrum.double().cumsum(-1)
    # A part in 10^12 of slack, as in rank@p: 3 of 10 equal parts reach 0.3.
    short = cumulative < share * cumulative[..., -1:] * (1 - 1e-12)
    return min(dims, int(short.sum(-1).max()) + 1)
