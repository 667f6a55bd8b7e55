"""A saved cache is one cache: its layers hold the same positions of the same rows, and what the model gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...artifacts import KvcalError, Layer
from ..kv.saved import Saved
from .layer import CompressedLayer
from .reading import ReadingLayer
from .stock import check_stock


def by_layer(tensors: Mapping[str, Tensor], layers: int) -> list[dict[str, Tensor]]:
    """The tensors `layers.INDEX.NAME` of each layer, by NAME. Raises KvcalError for other names."""
    found: list[dict[str, Tensor]] = [{} for _ in range(layers)]
    known = {str(index): state for index, state in enumerate(found)}
    for name, tensor in tensors.items():
        kind, index, rest = [*name.split(".", 2), "", ""][:3]
        if kind != "layers" or index not in known or not rest:
            raise KvcalError(f"tensor {name[:80]!r} is of no layer from 0 to {layers - 1}")
        known[index][rest] = tensor
    return found


def check_layers(layers: Sequence[Any], states: Sequence[Mapping[str, Tensor]], told: Sequence[Layer] = ()) -> None:
    """Hold each layer's tensors against one another and against the other layers'.

    Args:
        told: the model's layers, where an artifact tells of them. Without, `check_fits` sees to it later.

    Raises:
        KvcalError: names the layer.
    """
    valid: Tensor | None = None
    rows = seen = None
    ordered = sorted(enumerate(layers), key=lambda each: not isinstance(each[1], CompressedLayer))
    for index, layer in ordered:
        try:
            if isinstance(layer, ReadingLayer):
                if states[index]:
                    raise KvcalError("reads the cache of another layer, and holds tensors of its own")
            elif isinstance(layer, CompressedLayer):
                layer.store.check(Saved(states[index]))
                own = states[index]["valid"]
                if valid is not None and not torch.equal(own, valid):
                    raise KvcalError("valid: other positions than in the layers before")
                valid, (rows, seen) = own, own.shape
            else:
                rows, seen = check_stock(layer, states[index], rows, seen)
            if told and rows and states[index]:
                _check_shape(told[index], states[index])
        except KvcalError as error:
            raise KvcalError(f"layer {index}: {error}") from None


def _check_shape(layer: Layer, state: Mapping[str, Tensor]) -> None:
    queries = state.get("last.query")
    if queries is not None and queries.shape[1] != layer.query_heads:
        raise KvcalError(f"last.query has shape {list(queries.shape)}, expected {layer.query_heads} heads")
    keys, values = (state.get(f"tokens.{name}", state.get(f"{name}s")) for name in ("key", "value"))
    for name, found, dims in (("keys", keys, layer.head_dim), ("values", values, layer.value_dim)):
        if found is not None and (found.shape[1], found.shape[3]) != (layer.kv_heads, dims):
            raise KvcalError(f"{name} have shape {list(found.shape)}, expected {layer.kv_heads} heads of {dims}")


def check_fits(layer: Any, index: int, key: Tensor, value: Tensor) -> None:
    """Refuse new keys [B, Hkv, T, D] and values that are not of the shape and dtype of those that a layer holds.

    Raises:
        KvcalError: the cache is of another model, or the model was cast meanwhile.
    """
    if isinstance(layer, CompressedLayer):
        if isinstance(layer, ReadingLayer):
            return
        held = layer.store.like or (None, None)
    else:
        held = getattr(layer, "keys", None), getattr(layer, "values", None)
        if held[0] is not None and held[0].dim() == 4 and len(held[0]) != len(key):
            raise KvcalError(f"the cache holds {len(held[0])} rows, got a batch of {len(key)}: begin a new cache")
    for old, new in zip(held, (key, value), strict=True):
        if old is None or old.dim() != 4:
            continue
        if (old.shape[1], old.shape[3], old.dtype) != (new.shape[1], new.shape[3], new.dtype):
            raise KvcalError(
                f"layer {index}: the cache holds {old.shape[1]} heads of {old.shape[3]} dimensions in {old.dtype}, "
                f"the model gives {new.shape[1]} of {new.shape[3]} in {new.dtype}: begin a new cache"
            )
