"""What a model and given weights must be for layers to share keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor

from ...artifacts import KvcalError
from ..integration.routing import kind, watch
from .sharing_map import SharingMap

_PROBE = 4
"""Tokens; the first may have an embedding of zeros, and rotary embeddings leave position 0 as it is."""


def refuse_checkpointing(model: Any) -> None:
    """Raises KvcalError while gradient checkpointing is on."""
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise KvcalError(
            f"{kind(model)}: gradient checkpointing computes a layer again when what its storing layer kept is gone: "
            "call gradient_checkpointing_disable() before layers share keys and values"
        )


def refuse_tied(model: Any, names: AbstractSet[str]) -> None:
    """Raises KvcalError when a parameter that is to be replaced is tied to another."""
    places: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    for first, *others in places.values():
        if others and names & {first, *others}:
            raise KvcalError(
                f"{first} and {others[0]} are tied: layers can share keys and values where their projections and "
                "norms are their own: untie them first"
            )


def fitting(weights: Mapping[str, Tensor], named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of `weights`, of the device and dtype of the shared model's parameters `named`.

    Raises:
        KvcalError: a name or shape that the model has no place for.
    """
    made: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name not in named:
            raise KvcalError(f"weights: the shared model has no parameter {name}: give weights of these groups")
        parameter = named[name]
        if tensor.shape != parameter.shape:
            raise KvcalError(
                f"weights: {name} has shape {list(tensor.shape)}, this model needs {list(parameter.shape)}"
            )
        made[name] = tensor.detach().to(parameter.device, parameter.dtype, copy=True)
    return made


def check_equal(model: Any, sharing_map: SharingMap) -> None:
    """Raises KvcalError where a reading layer makes other keys or values of what its storing layer projects."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    if not sharing_map.shared:
        return
    watch(model, _PROBE, lambda module, query, key, value, *rest: seen.update({module.layer_idx: (key, value)}))
    for layer in sharing_map.reading:
        storing = sharing_map.storing_of(layer)
        for name, stored, read in zip(("keys", "values"), seen[storing], seen[layer], strict=True):
            if stored.shape != read.shape or not torch.allclose(stored, read, rtol=0, atol=0, equal_nan=True):
                raise KvcalError(
                    f"{kind(model)}: layer {layer} makes other {name} of what layer {storing} projects (e.g. by "
                    "another rotary embedding): put the two into different groups"
                )
