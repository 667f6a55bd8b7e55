"""What a group of layers loses when it shares: its attention outputs with the keys and values that fit it best.

Those are fitted much as where a training starts (`fit_group`): of every KV head D dimensions for all layers together,
weighted by the attention that tokens receive, keys in the metric of the queries, values in that of the cost. Here it is
on the reservoir, and from the layers' own keys and values, which the model has to predict from the storing layer's
input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

import torch
from torch import Tensor

from ...artifacts import Artifact
from ..pre_rotary import Rotation
from .cost import ReadingLayer
from .fitting import shared_keys, shared_rows
from .pairs import after_rotary, before_rotary

Group = tuple[int, ...]


def measure_groups(
    artifact: Artifact,
    groups: Collection[Group],
    rotation: Rotation | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """[L, L] float64, [b, a] for the group of neighbours from layer a to layer b; NaN for groups not asked for.

    A cost is the sum over the group's layers, the storing one too, of ‖o' - o‖² / ‖o‖² of their outputs on the sample
    (`ReadingLayer.error`). The fit is to the same sample: a part of it would miss the few first tokens of blocks, which
    matter most.

    For N tokens and a group of g layers O(g² N D² Hkv), and g passes of `ReadingLayer`.

    Args:
        rotation: the model's, from `rotation_of`; without it keys are fitted as rotated, with maps of any kind.
        progress: called with (groups done, groups in all).
    """
    found = torch.full((len(artifact.layers),) * 2, math.nan, dtype=torch.float64)
    layers: dict[int, _Layer] = {}
    for done, group in enumerate(sorted(groups)):
        layers = {layer: kept for layer, kept in layers.items() if layer >= group[0]}
        for layer in group:
            if layer not in layers:
                layers[layer] = _Layer(artifact, layer, rotation)
        found[group[-1], group[0]] = _cost([layers[layer] for layer in group], rotation)
        if progress:
            progress(done + 1, len(groups))
    return found


class _Layer:
    """What the reservoir has of one layer."""

    def __init__(self, artifact: Artifact, layer: int, rotation: Rotation | None):
        self.kind = artifact.layers[layer]
        position = artifact.stages["reservoir"].tensors["position"]
        query, key, value = (
            artifact.tensor("reservoir", layer, name).float() for name in ("query_post", "key_post", "value")
        )
        self.reader = ReadingLayer(query, key, value, position, self.kind.scaling)
        self.received = self.reader.received(key).double()
        self.key, self.value = before_rotary(key, self.kind, rotation).double(), value.double()
        queries = before_rotary(query, self.kind, rotation).double()
        self.query_second = queries.mT @ queries
        rotated = rotation is not None and self.kind.pre_rotary == "unrotate"
        self.rotary_dims = rotation[0].shape[-1] if rotated and rotation is not None else 0


def _cost(layers: list[_Layer], rotation: Rotation | None) -> float:
    weight = torch.stack([layer.received for layer in layers]).sum(0)
    keys, values = [], []
    for head in range(layers[0].key.shape[0]):
        rows, second, targets = _joint([layer.key[head] for layer in layers], weight)
        energies = [layer.query_second[head] for layer in layers]
        shared, maps = shared_keys(targets, energies, second, layers[0].rotary_dims)
        keys.append([rows @ shared.mT @ each.mT for each in maps])
        rows, second, targets = _joint([layer.value[head] for layer in layers], weight)
        plain = torch.eye(len(targets[0]), dtype=rows.dtype)
        shared, maps = shared_rows(targets, [plain / (layer.reader.output_square or 1.0) for layer in layers], second)
        values.append([rows @ shared.mT @ each.mT for each in maps])
    errors = [
        layer.reader.error(
            after_rotary(torch.stack([head[number] for head in keys]).float(), layer.kind, rotation),
            torch.stack([head[number] for head in values]).float(),
        )
        for number, layer in enumerate(layers)
    ]
    return math.fsum(error**2 for error in errors)


def _joint(parts: list[Tensor], weight: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(all layers' rows side by side [N, gD], their weighted second moment, maps [D, gD] that pick each layer's)."""
    rows = torch.cat(parts, 1)
    second = (rows * weight.unsqueeze(1)).mT @ rows
    return rows, second, list(torch.eye(rows.shape[1], dtype=rows.dtype).split(parts[0].shape[1]))
