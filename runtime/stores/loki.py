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

from torch import Tensor

from ...artifacts import Artifact, KvcalError
from ..attention import Logits
from .amounts import Amount, check_choice
from .basis import Basis
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
        basis = Basis.load(artifact, layer, self.rank, stage=self.stage, basis=self.basis)
        return lambda: LokiStore(self, basis)


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
