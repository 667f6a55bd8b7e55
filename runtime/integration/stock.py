"""What transformers' own cache layers hold, those of layers with a sliding window: saved, checked and restored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...artifacts import KvcalError


def stock_state(layer: Any) -> dict[str, Tensor]:
    if layer.keys is None:
        return {}
    return {"keys": layer.keys, "values": layer.values, "length": torch.tensor(layer.get_seq_length())}


def restore_stock(layer: Any, state: Mapping[str, Tensor]) -> None:
    if state:
        layer.lazy_initialization(state["keys"], state["values"])
        # More tokens than the window's are held while some may be taken back.
        kept = kept_of(layer)
        held = slice(-kept if kept else None, None)
        layer.keys, layer.values = state["keys"][:, :, held], state["values"][:, :, held]
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = int(state["length"])


def kept_of(layer: Any) -> int | None:
    """Tokens that transformers' own layer keeps: its window without the new token; None: all."""
    window = getattr(layer, "sliding_window", None)
    return window - 1 if window and window > 1 else None


def check_stock(layer: Any, state: Mapping[str, Tensor], batch: int | None, seen: int | None) -> tuple[int, int]:
    """(sequences, positions so far) of what `stock_state` gave.

    Args:
        batch, seen: sequences and positions of the other layers; None: there are no others.

    Raises:
        KvcalError: no layer of this kind holds such tensors.
    """
    if not state:
        if seen:
            raise KvcalError(f"keys are missing, other layers hold {seen} positions")
        return batch or 0, seen or 0
    if state.keys() != {"keys", "values", "length"}:
        raise KvcalError(f"holds {', '.join(sorted(state))}, expected keys, values and length")
    keys, values, length = state["keys"], state["values"], state["length"]
    if keys.dim() != 4 or values.dim() != 4 or keys.shape[:3] != values.shape[:3] or 0 in keys.shape[:2]:
        raise KvcalError(f"keys {list(keys.shape)} and values {list(values.shape)} do not go together")
    if not all(tensor.is_floating_point() and bool(tensor.isfinite().all()) for tensor in (keys, values)):
        raise KvcalError("keys or values are no finite numbers")
    if length.dtype != torch.int64 or length.dim():
        raise KvcalError("length is no whole number")
    positions, held, kept = int(length), keys.shape[2], kept_of(layer)
    if batch not in (None, keys.shape[0]) or seen not in (None, positions):
        raise KvcalError(f"{keys.shape[0]} rows of {positions} positions, other layers hold {batch} of {seen}")
    if not (positions if kept is None else min(positions, kept)) <= held <= positions:
        raise KvcalError(
            f"keys of {held} tokens, expected {positions if kept is None else min(positions, kept)} of {positions}"
        )
    return keys.shape[0], positions
