"""Split-KV attention over the first tokens of each row: `attend`'s tile and merge, without its gather."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attend.launch import STAGES, WARPS, logit_scales, tiles, units_tile
from ..attend.merge_kernel import Planned, merge
from ..attend.plan import part_of_plan
from ..attend.shapes import choose_splits
from ..attend.tile import absorb, empty_softmax, load_queries, store_partial
from ..backend import device_of

SMALLEST = 256
"""Tokens that a partial result should stand for: four tiles, enough to fill the pipeline."""


@triton.jit(do_not_specialize=["capacity", "rows", "splits"])
def dense_kernel(
    out_ptr,
    lse_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    lengths_ptr,
    scale,
    cap,
    capacity,
    rows,
    splits,
    key_row: tl.int64,
    key_head: tl.int64,
    key_step: tl.int64,
    value_row: tl.int64,
    value_head: tl.int64,
    value_step: tl.int64,
    ROWS: tl.constexpr,
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
    """One program: a part of one row's tokens, for one KV head."""
    part, head = tl.program_id(0), tl.program_id(1)
    row, begin, end = part_of_plan(lengths_ptr, part, rows, capacity, splits, ROWS, TOKEN_TILE)
    if row >= rows:
        return
    key_ptr += row * key_row + head * key_head
    value_ptr += row * value_row + head * value_head
    group = row * tl.num_programs(1) + head
    queries = load_queries(query_ptr, group, QUERIES, QUERY_TILE, D, D_TILE, UPCAST)
    best, mass, total = empty_softmax(QUERY_TILE, DV_TILE)
    for first in range(begin, end, TOKEN_TILE):
        token = first + tl.arange(0, TOKEN_TILE)
        best, mass, total = absorb(
            best, mass, total, queries, key_ptr, value_ptr, token, token < end, key_step, value_step, scale, cap,
            D, D_TILE, DV, DV_TILE, CAPPED, UPCAST,
        )  # fmt: skip
    slot = head * tl.num_programs(0) + part
    store_partial(out_ptr, lse_ptr, slot, best, mass, total, QUERIES, QUERY_TILE, DV, DV_TILE)


def dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    *,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    splits: int | None,
    out: Tensor | None,
) -> Tensor:
    rows, heads, capacity, width = value.shape
    splits = splits or choose_splits(rows * heads, capacity, SMALLEST, query.device)
    sizes = tiles(query, value, query.shape[2])
    slots = rows * splits + rows - 1
    own_out = torch.empty(heads, slots, query.shape[2], width, dtype=torch.float32, device=query.device)
    own_lse = torch.empty(heads, slots, query.shape[2], dtype=torch.float32, device=query.device)
    lengths = lengths.contiguous()
    with device_of(query):
        dense_kernel[(slots, heads)](
            own_out,
            own_lse,
            query.contiguous(),
            key,
            value,
            lengths,
            *logit_scales(scaling, softcap),
            capacity,
            rows,
            splits,
            *key.stride()[:3],
            *value.stride()[:3],
            ROWS=units_tile(rows),
            CAPPED=softcap is not None,
            **sizes,
            num_warps=WARPS,
            num_stages=STAGES,
        )
    own = Planned(own_out, own_lse, lengths, capacity, splits, sizes["TOKEN_TILE"])
    return merge(own, sinks, query, out)
