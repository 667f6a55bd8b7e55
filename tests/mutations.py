"""What may be wrong in one tensor of a saved cache, one thing at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

WHOLE = (torch.int8, torch.uint8, torch.int32, torch.int64)


def mutations(tensor: Tensor) -> Iterator[tuple[str, Tensor | None]]:
    """(what was done, the tensor afterwards); None: it is gone."""
    yield "gone", None
    yield from _other_shapes(tensor)
    for dtype in (torch.float16, torch.float64, torch.int32, torch.int64, torch.uint8):
        if dtype != tensor.dtype and tensor.dim():
            yield f"as {dtype}", tensor.to(dtype)
    if not tensor.numel():
        return
    if tensor.dtype == torch.bool:
        yield from _entries(tensor, {"flipped": lambda entry: ~entry})
        yield "of a byte that is no bool", tensor.view(torch.uint8).add(2).view(torch.bool)
    elif tensor.dtype in WHOLE:
        most = torch.iinfo(tensor.dtype).max
        changes = {"one more": lambda entry: entry + 1, "one less": lambda entry: entry - 1, "-1": lambda entry: -1}
        large = {"the most": lambda entry: most, "2^40": lambda entry: min(most, 1 << 40), "0": lambda entry: 0}
        yield from _entries(tensor, {**changes, **large})
        yield "all one more", tensor + 1
        yield "all 0", torch.zeros_like(tensor)
        for dimension in range(tensor.dim()):
            yield f"reversed along {dimension}", tensor.flip(dimension)
            yield f"rolled along {dimension}", tensor.roll(1, dimension)
    elif tensor.is_floating_point():
        yield from _entries(tensor, {"NaN": lambda entry: torch.nan, "infinite": lambda entry: -torch.inf})


def _other_shapes(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "in one more dimension", tensor.unsqueeze(-1)
    if tensor.dim():
        yield "flat", tensor.flatten()[:, None]
    for dimension, size in enumerate(tensor.shape):
        if size:
            yield f"shorter along {dimension}", tensor.narrow(dimension, 0, size - 1)
        yield f"twice along {dimension}", torch.cat((tensor, tensor), dimension)
        yield f"longer along {dimension}", torch.cat((tensor, tensor.narrow(dimension, 0, min(1, size))), dimension)


def _entries(tensor: Tensor, changes: dict) -> Iterator[tuple[str, Tensor]]:
    for place in sorted({0, tensor.numel() - 1}):
        for what, change in changes.items():
            changed = tensor.clone(memory_format=torch.contiguous_format)
            flat = changed.view(-1)
            flat[place] = change(flat[place])
            yield f"entry {place}: {what}", changed
