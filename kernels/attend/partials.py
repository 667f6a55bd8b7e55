"""Partials of contiguous tokens, for `extra`: a dense window, and the tail of clusters that were not read."""

import triton
import triton.language as tl
from torch import Tensor

from ..backend import device_of
from .launch import STAGES, WARPS, by_query, empty_partial, logit_scales, tiles
from .plan import even_part
from .shapes import TOKEN_TILE, Partial, choose_splits
from .tile import absorb, empty_softmax, load_queries, store_partial


@triton.jit(do_not_specialize=["heads", "capacity", "splits"])
def range_kernel(
    out_ptr,
    lse_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    begin_ptr,
    end_ptr,
    unread_ptr,
    scale,
    cap,
    heads,
    capacity,
    splits,
    key_row: tl.int64,
    key_head: tl.int64,
    key_step: tl.int64,
    value_row: tl.int64,
    value_head: tl.int64,
    value_step: tl.int64,
    SHARING: tl.constexpr,
    TAIL: tl.constexpr,
    QUERIES: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    TOKEN_TILE: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    DV: tl.constexpr,
    DV_TILE: tl.constexpr,
    CAPPED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One program: a part of one group's range; TAIL: of all `capacity` clusters, those with something unread."""
    slot = tl.program_id(0)  # on one axis: the others end at 65535
    part, group = slot % splits, slot // splits
    row, head = group // SHARING // heads, group // SHARING % heads
    key_ptr += row * key_row + head * key_head
    value_ptr += row * value_row + head * value_head
    if TAIL:
        unread_ptr += group.to(tl.int64) * capacity
        begin, end = even_part(capacity, part, splits, TOKEN_TILE)
    else:
        offset = tl.maximum(tl.load(begin_ptr + row), 0)
        count = tl.minimum(tl.load(end_ptr + row), capacity) - offset
        begin, end = even_part(tl.maximum(count, 0), part, splits, TOKEN_TILE)
        begin, end = begin + offset, end + offset
    queries = load_queries(query_ptr, group, QUERIES, QUERY_TILE, D, D_TILE, UPCAST)
    best, mass, total = empty_softmax(QUERY_TILE, DV_TILE)
    for first in range(begin, end, TOKEN_TILE):
        token = first + tl.arange(0, TOKEN_TILE)
        valid = token < end
        addend = None
        if TAIL:
            unread = tl.load(unread_ptr + token, mask=valid, other=0.0)
            valid = unread > 0
            addend = tl.log2(tl.where(valid, unread, 1.0))
        best, mass, total = absorb(
            best, mass, total, queries, key_ptr, value_ptr, token, valid, addend, key_step, value_step, scale, cap,
            D, D_TILE, DV, DV_TILE, CAPPED, UPCAST,
        )  # fmt: skip
    store_partial(out_ptr, lse_ptr, slot, best, mass, total, QUERIES, QUERY_TILE, DV, DV_TILE)


def window(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    begin: Tensor,
    end: Tensor,
    *,
    scaling: float,
    softcap: float | None,
    most: int,
    splits: int | None,
) -> Partial:
    return _partial(query, key, value, (begin.contiguous(), end.contiguous()), None, scaling, softcap, most, splits)


def tail(
    query: Tensor,
    mean_key: Tensor,
    mean_value: Tensor,
    unread: Tensor,
    *,
    scaling: float,
    softcap: float | None,
    splits: int | None,
) -> Partial:
    most = unread.shape[-1]
    return _partial(query, mean_key, mean_value, None, unread.contiguous(), scaling, softcap, most, splits)


def _partial(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    limits: tuple[Tensor, Tensor] | None,
    unread: Tensor | None,
    scaling: float,
    softcap: float | None,
    most: int,
    splits: int | None,
) -> Partial:
    pairs = key.shape[0] * key.shape[1]
    groups = pairs if unread is None or unread.dim() == 3 else pairs * query.shape[2]
    splits = splits or choose_splits(groups, most, 2 * TOKEN_TILE, query.device)
    out, lse = empty_partial(query, value.shape[-1], groups, splits)
    begin, end = limits or (lse, lse)
    with device_of(query):
        range_kernel[(groups * splits,)](
            out,
            lse,
            query.contiguous(),
            key,
            value,
            begin,
            end,
            lse if unread is None else unread,
            *logit_scales(scaling, softcap),
            key.shape[1],
            key.shape[2],
            splits,
            *key.stride()[:3],
            *value.stride()[:3],
            SHARING=groups // pairs,
            TAIL=unread is not None,
            CAPPED=softcap is not None,
            **tiles(query, value, lse.shape[-1]),
            num_warps=WARPS,
            num_stages=STAGES,
        )
    return by_query(query, (out, lse))
