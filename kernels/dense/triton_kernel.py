"""Split-KV attention over the first tokens of each sequence: `attend`'s tile and merge, without its gather."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attend.launch import STAGES, WARPS, logit_scales, tiles, units_tile
from ..attend.merge_kernel import Partials, merge
from ..attend.shapes import choose_splits
from ..attend.split import part_of_program
from ..attend.tile import PAGE, absorb, empty_softmax, load_queries, store_partial
from ..backend import device_of
from ..pages.table import capacity_of

SMALLEST = 256
"""Tokens that a partial result should stand for: four tiles, enough to fill the pipeline."""


@triton.jit(do_not_specialize=["capacity", "sequences", "splits", "table_ptr", "table_sequence"])
def dense_kernel(
    out_ptr,
    lse_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    lengths_ptr,
    table_ptr,
    scale,
    cap,
    capacity,
    sequences,
    splits,
    key_sequence: tl.int64,
    key_head: tl.int64,
    key_step: tl.int64,
    value_sequence: tl.int64,
    value_head: tl.int64,
    value_step: tl.int64,
    table_sequence,
    SEQUENCES: tl.constexpr,
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
    """One program: a part of one sequence's tokens, for one KV head."""
    part, head = tl.program_id(0), tl.program_id(1)
    sequence, begin, end = part_of_program(lengths_ptr, part, sequences, capacity, splits, SEQUENCES, TOKEN_TILE)
    if sequence >= sequences:
        return
    if PAGED:
        key_ptr += head * key_head
        value_ptr += head * value_head
        table_ptr += sequence.to(tl.int64) * table_sequence
        page = tl.load(table_ptr + begin // PAGE)
    else:
        key_ptr += sequence * key_sequence + head * key_head
        value_ptr += sequence * value_sequence + head * value_head
    group = sequence * tl.num_programs(1) + head
    queries = load_queries(query_ptr, group, QUERIES, QUERY_TILE, D, D_TILE, UPCAST)
    best, mass, total = empty_softmax(QUERY_TILE, DV_TILE)
    for first in range(begin, end, TOKEN_TILE):
        token = first + tl.arange(0, TOKEN_TILE)
        valid, keys, values = token < end, key_ptr, value_ptr
        if PAGED:  # a tile lies in one page, which the turn before loaded
            keys, values = key_ptr + page.to(tl.int64) * key_sequence, value_ptr + page.to(tl.int64) * value_sequence
            token %= PAGE
            following = first + TOKEN_TILE
            page = tl.load(table_ptr + following // PAGE, mask=following < end, other=0)
        best, mass, total = absorb(
            best, mass, total, queries, keys, values, token, valid, key_step, value_step, scale, cap,
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
    sink_logits: Tensor | None,
    table: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    (sequences, heads), width, capacity = query.shape[:2], value.shape[3], capacity_of(key, table)
    splits = choose_splits(sequences * heads, capacity, SMALLEST, query.device)
    sizes = tiles(query, value, query.shape[2])
    slots = sequences * splits + sequences - 1
    partial_out = torch.empty(heads, slots, query.shape[2], width, dtype=torch.float32, device=query.device)
    partial_lse = torch.empty(heads, slots, query.shape[2], dtype=torch.float32, device=query.device)
    lengths = lengths.contiguous()
    with device_of(query):
        dense_kernel[(slots, heads)](
            partial_out,
            partial_lse,
            query.contiguous(),
            key,
            value,
            lengths,
            table,
            *logit_scales(scaling, softcap),
            capacity,
            sequences,
            splits,
            *key.stride()[:3],
            *value.stride()[:3],
            0 if table is None else table.stride(0),
            SEQUENCES=units_tile(sequences),
            CAPPED=softcap is not None,
            PAGED=table is not None,
            **sizes,
            num_warps=WARPS,
            num_stages=STAGES,
        )
    partials = Partials(partial_out, partial_lse, lengths, capacity, splits, sizes["TOKEN_TILE"])
    return merge(partials, sink_logits, query, out)
