"""What the reservoir has of a group of layers, to fit codes to it (`group_fit`) and to see what they lose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...artifacts import Artifact, Layer
from ...runtime.cla.group_code import KINDS, RowCode, turned
from .cost import ReadingLayer
from .group_fit import Fit, Rows, cost_of, fit_group


class GroupSample:
    """Of one group. Its rows are read anew at every use: those of all groups take much memory."""

    def __init__(self, artifact: Artifact, layers: Sequence[Layer], angles: Tensor):
        self._artifact, self._layers = artifact, layers
        position = artifact.stages["reservoir"].tensors["position"]
        self._position = position
        self._angles = [angles if layer.pre_rotary == "unrotate" else angles[:0] for layer in layers]
        received = torch.zeros(len(position), dtype=torch.float64)
        for layer in layers:
            query, key, value = (
                artifact.finite("reservoir", layer.index, name).float() for name in ("query_post", "key_post", "value")
            )
            received += ReadingLayer(query, key, value, position, layer.scaling).received(key).double()
        self._weight = received / received.sum()

    def fit(self, level: float) -> dict[int, dict[str, Fit]]:
        """By layer, codes of "key" and "value"; see `fit_group`."""
        fits = {kind: fit_group(self._rows(kind), self._weight, level) for kind in KINDS}
        return {layer.index: {kind: fits[kind][at] for kind in KINDS} for at, layer in enumerate(self._layers)}

    def lost(self, codes: Sequence[Mapping[str, RowCode]]) -> list[list[float]]:
        """For each layer `Fit.lost` of "key" and "value" with these codes."""
        found = []
        for kind in KINDS:
            told = None
            of_kind = []
            for layer, code in zip(self._rows(kind), (codes_of[kind] for codes_of in codes), strict=True):
                rows = layer.rows.float()[None]
                told = rows[..., :0] if told is None else told
                told = torch.cat((told, code.coefficients(*code.encode(rows, told))), -1)
                of_kind.append(cost_of(code.restore(told)[0].double() - layer.rows, layer, self._weight))
            found.append(of_kind)
        return [list(of_layer) for of_layer in zip(*found, strict=True)]

    def _rows(self, kind: str) -> list[Rows]:
        if kind == "value":
            return [self._values(layer) for layer in self._layers]
        return [self._keys(layer, angles) for layer, angles in zip(self._layers, self._angles, strict=True)]

    def _keys(self, layer: Layer, angles: Tensor) -> Rows:
        """The metric is E[(q·Δk)²] of queries that stand where the key is.

        The mean over all distances, which the moments after the rotary embedding would give, erred more when it was
        tried: what is attended to most is near.
        """
        rows = self._artifact.tensor("reservoir", layer.index, "key_post").double()
        second = self._second(layer, "query_pre" if len(angles) else "query_post")
        rotated = 2 * len(angles)
        if rotated:  # YaRN and the like make what they rotate longer, keys and queries; of queries that was undone
            both = (self._second(layer, "query_post"), second)
            after, before = (matrix.diagonal(dim1=1, dim2=2)[:, :rotated].sum() for matrix in both)
            longer = second.new_ones(second.shape[-1])
            longer[:rotated] = (after / before.clamp_min(torch.finfo(before.dtype).tiny)).sqrt()
            if not torch.allclose(longer, torch.ones_like(longer), rtol=1e-3):
                second = longer.unsqueeze(-1) * second * longer
        return Rows(turned(rows[None], angles, self._position, back=True)[0], layer.scaling**2 * second)

    def _second(self, layer: Layer, quantity: str) -> Tensor:
        """[Hkv, D, D] second moments."""
        mean, covariance = (
            self._artifact.finite("moments", layer.index, f"{quantity}.{part}") for part in ("mean", "covariance")
        )
        return covariance + mean.unsqueeze(-1) * mean.unsqueeze(-2)

    def _values(self, layer: Layer) -> Rows:
        rows = self._artifact.tensor("reservoir", layer.index, "value").double()
        centred = rows - (self._weight @ rows).unsqueeze(1)
        variance = (self._weight @ centred.square()).sum(-1).clamp_min(torch.finfo(torch.float64).tiny)
        return Rows(rows, torch.eye(rows.shape[-1], dtype=torch.float64) / variance.view(-1, 1, 1))
