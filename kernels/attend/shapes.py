"""What a call's shapes decide: whether the operands fit together, and into how many programs the work is cut."""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from ..pages import PAGE
from ..pages.table import check_table

TOKEN_TILE = 64
"""Tokens of a tile: the granularity of every split."""


def check_cache(query: Tensor, key: Tensor, value: Tensor, table: Tensor | None = None) -> None:
    """query [B, Hkv, G, D], key [B, Hkv, capacity, D], value [B, Hkv, capacity, Dv]; with a table [B, P] key
    [N, Hkv, PAGE, D], value [N, Hkv, PAGE, Dv]."""
    if query.dim() != 4:
        raise ValueError(f"query: received shape {tuple(query.shape)}, expected [B, Hkv, G, D]")
    batch, heads, _, width = query.shape
    check_table(table, batch, query.device)
    fits = key.dim() == 4 and key.shape[1::2] == (heads, width)
    if not fits or (key.shape[0] != batch if table is None else key.shape[2] != PAGE):
        expected = f"{batch}, {heads}, capacity" if table is None else f"N, {heads}, {PAGE}"
        raise ValueError(f"key: received shape {tuple(key.shape)}, expected [{expected}, {width}]")
    if value.dim() != 4 or value.shape[:3] != key.shape[:3]:
        raise ValueError(f"value: received shape {tuple(value.shape)}, expected {[*key.shape[:3]]} and Dv")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name}: received {tensor.dtype}, expected the query's {query.dtype}")
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name}: received stride {tensor.stride(-1)} over a token, expected 1")


def check(name: str, tensor: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> None:
    """ValueError unless `tensor` has this dtype and shape."""
    if tensor.dtype != dtype or list(tensor.shape) != list(shape):
        raise ValueError(f"{name}: received {tensor.dtype} {list(tensor.shape)}, expected {dtype} {list(shape)}")


def check_result(query: Tensor, width: int, sink_logits: Tensor | None, out: Tensor | None) -> None:
    """ValueError unless `sink_logits` and `out` fit a result of `width` dimensions."""
    batch, heads, group, _ = query.shape
    if sink_logits is not None:
        check("sink_logits", sink_logits, torch.float32, [heads * group])
    if out is not None:
        check("out", out, query.dtype, [batch, heads, group, width])
        if not out.is_contiguous():
            raise ValueError(f"out: received strides {out.stride()}, expected a contiguous tensor")


def check_selection(query: Tensor, index: Tensor, count: Tensor) -> None:
    """index [B, Hkv, K], or [B, Hkv, G, K] where every query head reads tokens of its own; count likewise without K."""
    groups = query.shape[: 3 if index.dim() == 4 else 2]
    check("index", index, torch.int32, [*groups, index.shape[-1]])
    check("count", count, torch.int32, groups)


def choose_splits(groups: int, most: int, smallest: int, device: torch.device) -> int:
    """Into how many parts the tokens of each group are cut, from shapes alone (the README has the arithmetic).

    Args:
        groups: (sequence, head) pairs that read tokens of their own.
        most: tokens that a group can have.
        smallest: tokens below which a part is not worth its partial result, once the GPU is full without it.
    """
    count = multiprocessors(device)
    eight_each = min(_ceil(8 * count, groups), _ceil(most, smallest))
    two_each = min(_ceil(2 * count, groups), _ceil(most, TOKEN_TILE))
    return max(1, eight_each, two_each)


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; without one those of an H100."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _ceil(number: int, by: int) -> int:
    return -(-number // by)
