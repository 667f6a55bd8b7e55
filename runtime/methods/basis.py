"""Calibrated low-rank maps of queries and keys, whose products stand for q·k."""

from __future__ import annotations

import torch
from torch import Tensor

from ...artifacts import Artifact, KvcalError
from .amounts import Amount, check_amount, count_of

UPTRAIN = "`calibrate share ARTIFACT --model M --data D --steps N --uptrain`"
"""The command that makes bases of keys that layers share."""


class Basis:
    """Two maps [Hkv, r, D] whose products with queries and keys give the scores; one object for all caches."""

    def __init__(self, query_map: Tensor, key_map: Tensor, rank: int):
        self.rank, self.query_map, self.key_map = rank, query_map, key_map
        self._maps = {(torch.device("cpu"), torch.float32): (query_map, key_map)}

    @classmethod
    def load(
        cls, artifact: Artifact, layer: int, rank: Amount | str, *, stage: str = "post", basis: str = "pca"
    ) -> Basis:
        """The first dimensions of a calibrated basis, see `rank_of` for `rank`."""
        if basis == "pca":
            components = artifact.tensor("pca", layer, f"key_{stage}.components")
            ordered_by = "eigenvalues" if artifact.settings.get("centred", True) else "eigenvalues_uncentred"
            spectrum = artifact.tensor("pca", layer, f"key_{stage}.{ordered_by}")
            return cls(components, components, rank_of(rank, spectrum))
        query_map, key_map = (artifact.tensor("score", layer, f"{stage}.{name}_map") for name in ("query", "key"))
        spectrum = artifact.tensor("score", layer, f"{stage}.singular_values") ** 2
        dims = rank_of(rank, spectrum)
        return cls(query_map[:, :dims].contiguous(), key_map[:, :dims].contiguous(), dims)

    def on_heads(self, heads: slice) -> Basis:
        """The maps of some KV heads."""
        if self.query_map is self.key_map:
            maps = self.query_map[heads]
            return Basis(maps, maps, self.rank)
        return Basis(self.query_map[heads], self.key_map[heads], self.rank)

    def maps(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """(query map, key map) on the device and in the dtype of `like`."""
        place = (like.device, like.dtype)
        if place not in self._maps:
            loaded = next(iter(self._maps.values()))
            self._maps[place] = (loaded[0].to(like), loaded[1].to(like))
        return self._maps[place]


def rank_of(rank: Amount | str, spectrum: Tensor) -> int:
    """How many dimensions a fraction, a count or "variance:0.9" means.

    Args:
        spectrum: [Hkv, D], descending: eigenvalues or squared singular values, of which each dimension has one.
    """
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
