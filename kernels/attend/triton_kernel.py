"""Split-KV attention over gathered tokens: one launch leaves partials, `merge_kernel` makes one output of them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import device_of
from .launch import STAGES, WARPS, logit_scales, tiles, units_tile
from .merge_kernel import Partials, merge
from .shapes import choose_splits
from .split import part_of_program
from .tile import PAGE, absorb, empty_softmax, load_queries, store_partial

SMALLEST = 128
"""Tokens that a partial result should stand for."""
PAGED_STAGES = STAGES + 1
"""One for the pages, which stand between the indices and the tokens."""


@triton.jit(do_not_specialize=["heads", "chosen", "units", "splits", "table_ptr", "table_sequence"])
def attend_kernel(
    out_ptr,
    lse_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    index_ptr,
    count_ptr,
    table_ptr,
    scale,
    cap,
    heads,
    chosen,
    units,
    splits,
    key_sequence: tl.int64,
    key_head: tl.int64,
    key_step: tl.int64,
    value_sequence: tl.int64,
    value_head: tl.int64,
    value_step: tl.int64,
    table_sequence,
    SHARING: tl.constexpr,
    UNITS: tl.constexpr,
    QUERIES: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    TOKEN_TILE: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    DV: tl.constexpr,
    DV_TILE: tl.constexpr,
    CAPPED: tl.constexpr,
    UPCAST: tl.constexpr,
    PAGED: tl.constexpr,
):
    """One program: a part of the `chosen` indices of one group; SHARING groups have the same keys."""
    slot = tl.program_id(0)
    group, begin, end = part_of_program(count_ptr, slot, units, chosen, splits, UNITS, TOKEN_TILE)
    if group >= units:
        return
    sequence, head = group // SHARING // heads, group // SHARING % heads
    if PAGED:
        key_ptr += head * key_head
        value_ptr += head * value_head
        table_ptr += sequence.to(tl.int64) * table_sequence
    else:
        key_ptr += sequence * key_sequence + head * key_head
        value_ptr += sequence * value_sequence + head * value_head
    index_ptr += group.to(tl.int64) * chosen
    queries = load_queries(query_ptr, group, QUERIES, QUERY_TILE, D, D_TILE, UPCAST)
    best, mass, total = empty_softmax(QUERY_TILE, DV_TILE)
    for first in range(begin, end, TOKEN_TILE):
        rank = first + tl.arange(0, TOKEN_TILE)
        valid = rank < end
        token = tl.load(index_ptr + rank, mask=valid, other=0)
        keys, values = key_ptr, value_ptr
        if PAGED:
            page = tl.load(table_ptr + token // PAGE, mask=valid, other=0).to(tl.int64)[:, None]
            keys, values, token = key_ptr + page * key_sequence, value_ptr + page * value_sequence, token % PAGE
        best, mass, total = absorb(
            best, mass, total, queries, keys, values, token, valid, key_step, value_step, scale, cap,
            D, D_TILE, DV, DV_TILE, CAPPED, UPCAST,
        )  # fmt: skip
    store_partial(out_ptr, lse_ptr, slot, best, mass, total, QUERIES, QUERY_TILE, DV, DV_TILE)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    count: Tensor,
    *,
    scaling: float,
    softcap: float | None,
    sink_logits: Tensor | None,
    table: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    chosen, groups = index.shape[-1], count.numel()
    queries = query.numel() // query.shape[-1] // groups
    splits = choose_splits(groups, chosen, SMALLEST, query.device)
    width, sizes = value.shape[-1], tiles(query, value, queries)
    slots = groups * splits + groups - 1
    partial_out = torch.empty(1, slots, queries, width, dtype=torch.float32, device=query.device)
    partial_lse = torch.empty(1, slots, queries, dtype=torch.float32, device=query.device)
    count = count.contiguous()
    with device_of(query):
        attend_kernel[(slots,)](
            partial_out,
            partial_lse,
            query.contiguous(),
            key,
            value,
            index.contiguous(),
            count,
            table,
            *logit_scales(scaling, softcap),
            key.shape[1],
            chosen,
            groups,
            splits,
            *key.stride()[:3],
            *value.stride()[:3],
            0 if table is None else table.stride(0),
            SHARING=groups // (query.shape[0] * query.shape[1]),
            UNITS=units_tile(groups),
            CAPPED=softcap is not None,
            PAGED=table is not None,
            **sizes,
            num_warps=WARPS,
            num_stages=STAGES if table is None else PAGED_STAGES,
        )
    partials = Partials(partial_out, partial_lse, count, chosen, splits, sizes["TOKEN_TILE"])
    return merge(partials, sink_logits, query, out)
