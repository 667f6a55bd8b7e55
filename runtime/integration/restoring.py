"""Checks of a saved cache: its layers hold the same positions of the same sequences, in shapes of the model."""

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
    states: list[dict[str, Tensor]] = [{} for _ in range(layers)]
    state_of = {str(layer_idx): state for layer_idx, state in enumerate(states)}
    for name, tensor in tensors.items():
        kind, layer_idx, state_name = [*name.split(".", 2), "", ""][:3]
        if kind != "layers" or layer_idx not in state_of or not state_name:
            raise KvcalError(f"tensor {name[:80]!r} is of no layer from 0 to {layers - 1}")
        state_of[layer_idx][state_name] = tensor
    return states


def check_layers(layers: Sequence[Any], states: Sequence[Mapping[str, Tensor]], told: Sequence[Layer] = ()) -> None:
    """Check each layer's tensors against one another and against the other layers'.

    Args:
        told: the model's layers, where an artifact describes them; else `check_fits` checks their shapes later.

    Raises:
        KvcalError: names the layer.
    """
    valid: Tensor | None = None
    sequences = seen = None
    ordered = sorted(enumerate(layers), key=lambda entry: not isinstance(entry[1], CompressedLayer))
    for layer_idx, layer in ordered:
        try:
            if isinstance(layer, ReadingLayer):
                if states[layer_idx]:
                    raise KvcalError("reads the cache of another layer, and holds tensors of its own")
            elif isinstance(layer, CompressedLayer):
                layer.store.check(Saved(states[layer_idx]))
                layer_valid = states[layer_idx]["valid"]
                if valid is not None and not torch.equal(layer_valid, valid):
                    raise KvcalError("valid: other positions than in the layers before")
                valid, (sequences, seen) = layer_valid, layer_valid.shape
            else:
                sequences, seen = check_stock(layer, states[layer_idx], sequences, seen)
            if told and sequences and states[layer_idx]:
                _check_shape(told[layer_idx], states[layer_idx])
        except KvcalError as error:
            raise KvcalError(f"layer {layer_idx}: {error}") from None


def _check_shape(layer: Layer, state: Mapping[str, Tensor]) -> None:
    queries = state.get("last.query")
    if queries is not None and queries.shape[1] != layer.query_heads:
        raise KvcalError(f"last.query has shape {list(queries.shape)}, expected {layer.query_heads} heads")
    keys, values = (state.get(f"tokens.{name}", state.get(f"{name}s")) for name in ("key", "value"))
    for name, tensor, dims in (("keys", keys, layer.head_dim), ("values", values, layer.value_dim)):
        if tensor is not None and (tensor.shape[1], tensor.shape[3]) != (layer.kv_heads, dims):
            raise KvcalError(f"{name} have shape {list(tensor.shape)}, expected {layer.kv_heads} heads of {dims}")


def check_fits(layer: Any, layer_idx: int, key: Tensor, value: Tensor) -> None:
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
                f"layer {layer_idx}: the cache holds {old.shape[1]} heads of {old.shape[3]} dimensions in {old.dtype}, "
                f"the model gives {new.shape[1]} of {new.shape[3]} in {new.dtype}: begin a new cache"
            )
