"""Checks of the stage `xcla`: that coefficients, bits and maps of a group's layers fit one another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .artifact import Layer, indices_in
from .claims import bounded, require, require_that

PACKED = 4
"""Every count is a multiple of it: four coefficients of 2 bits fill a byte."""


def check_group_codes(where: str, tensors: Mapping[str, Tensor], layers: Sequence[Layer]) -> None:
    """Raise ArtifactError for values that no codes of groups have."""
    bounded(where, "angles", tensors["angles"], -math.pi, math.pi, by_head=False)
    held = [layer for layer in layers if layer.index in indices_in(tensors)]
    for layer in held:
        prefix = f"layers.{layer.index}."
        bounded(where, f"{prefix}told", tensors[f"{prefix}told"], most=1, by_head=False)
        bounded(where, f"{prefix}lost", tensors[f"{prefix}lost"], 0, by_head=False)
        planes = len(tensors["angles"]) if layer.pre_rotary == "unrotate" else 0
        require_that(where, "angles", 2 * planes <= layer.head_dim, f"of {planes}", f"at most {layer.head_dim // 2}")
        earlier = _check_earlier(where, prefix, tensors, layer, held)
        for kind, dims in (("key", layer.head_dim), ("value", layer.value_dim)):
            _check_counts(where, f"{prefix}{kind}.counts", tensors[f"{prefix}{kind}.counts"], dims)
            own = int(tensors[f"{prefix}{kind}.counts"].sum())
            told = sum(int(tensors[f"layers.{index}.{kind}.counts"].sum()) for index in earlier)
            for name, dim, wanted in (("basis", 2, own), ("back", 1, told + own)):
                found = tensors[f"{prefix}{kind}.{name}"]
                fits, what = found.shape[dim] == wanted, f"{wanted}, as counts of the group's layers tell"
                require_that(where, f"{prefix}{kind}.{name}", fits, f"of {found.shape[dim]} coefficients", what)
                bounded(where, f"{prefix}{kind}.{name}", found)
            bounded(where, f"{prefix}{kind}.offset", tensors[f"{prefix}{kind}.offset"])


def _check_earlier(
    where: str, prefix: str, tensors: Mapping[str, Tensor], layer: Layer, held: Sequence[Layer]
) -> list[int]:
    """The earlier layers of a group, which are alike, each with those before it as its own."""
    name, found = f"{prefix}earlier", tensors[f"{prefix}earlier"]
    kinds = {other.index: (other.kv_heads, other.head_dim, other.value_dim) for other in held}
    earlier: list[int] = found.tolist()
    for at, index in enumerate(earlier):
        alike = index < layer.index and kinds.get(index) == kinds[layer.index]
        what = "an earlier layer with as many KV heads and dimensions"
        require(where, name, torch.tensor([alike]), found[at : at + 1], what, by_head=False)
        before = tensors[f"layers.{index}.earlier"].tolist()
        require_that(where, name, before == earlier[:at], earlier, f"those of layer {index}, {before}, then {index}")
    return earlier


def _check_counts(where: str, name: str, found: Tensor, dims: int) -> None:
    holds = (found >= 0) & (found <= dims) & (found % PACKED == 0)
    require(where, name, holds, found, f"a multiple of {PACKED}, 0 to {dims}", by_head=False)
    require_that(where, name, 0 < int(found.sum()) <= dims, int(found.sum()), f"1 to {dims} in all")
