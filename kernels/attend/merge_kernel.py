"""The reduction: the partial results of a query, and the model's sink logit, become one output."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import device_of
from .launch import units_tile
from .split import parts_of_unit
from .tile import LOG2E, NONE

COLUMNS = 32
"""Dimensions of the values per program: 128 bytes of every partial, so that few queries still make many programs."""
PARTS_TILE = 64


@dataclass(frozen=True)
class Partials:
    """Partial results of the programs, slot by slot; `split` deals the slots out to the units."""

    out: Tensor
    """[axis, slots, queries, Dv] float32; the groups of a unit are on the first axis."""
    lse: Tensor
    """[axis, slots, queries] float32, the natural logarithm of the mass; -inf where there is none."""
    counts: Tensor
    """[units] int32"""
    most: int
    """Tokens that a unit has at most."""
    splits: int
    token_tile: int


@triton.jit(do_not_specialize=["units", "most", "splits", "slots", "per_unit"])
def merge_kernel(
    out_ptr,
    part_ptr,
    lse_ptr,
    counts_ptr,
    units,
    most,
    splits,
    slots,
    per_unit,
    sink_logits_ptr,
    query_heads,
    SINK_LOGITS: tl.constexpr,
    QUERIES: tl.constexpr,
    DV: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS_TILE: tl.constexpr,
    UNITS: tl.constexpr,
    TOKEN_TILE: tl.constexpr,
):
    """One program: COLUMNS columns of one query."""
    query = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    best = tl.full([], NONE, tl.float32)
    mass = tl.full([], 0.0, tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    group = query // QUERIES
    first, parts = parts_of_unit(counts_ptr, group // per_unit, units, most, splits, UNITS, TOKEN_TILE)
    row = ((group % per_unit) * slots + first).to(tl.int64) * QUERIES + query % QUERIES
    part_ptr += row * DV
    lse_ptr += row
    for begin in range(0, parts, PARTS_TILE):
        part = begin + tl.arange(0, PARTS_TILE)
        inside = (part < parts)[:, None] & (column < DV)[None, :]
        lse = tl.load(lse_ptr + part * QUERIES, mask=part < parts, other=NONE) * LOG2E
        out = tl.load(part_ptr + part[:, None] * (QUERIES * DV) + column[None, :], mask=inside, other=0.0)
        out = tl.where((lse == NONE)[:, None], 0.0, out)
        risen = tl.maximum(best, tl.max(lse, 0))
        shift = tl.where(risen == NONE, 0.0, risen)
        weights = tl.exp2(lse - shift)
        fade = tl.exp2(best - shift)
        mass = mass * fade + tl.sum(weights, 0)
        total = total * fade + tl.sum(weights[:, None] * out, 0)
        best = risen
    if SINK_LOGITS:
        sink_logit = tl.load(sink_logits_ptr + query % query_heads).to(tl.float32) * LOG2E
        risen = tl.maximum(best, sink_logit)
        shift = tl.where(risen == NONE, 0.0, risen)
        fade = tl.exp2(best - shift)
        mass = mass * fade + tl.exp2(sink_logit - shift)
        total = total * fade
    total = total / tl.where(mass == 0, 1.0, mass)
    tl.store(out_ptr + query.to(tl.int64) * DV + column, total.to(out_ptr.dtype.element_ty), mask=column < DV)


def merge(partials: Partials, sink_logits: Tensor | None, query: Tensor, out: Tensor | None) -> Tensor:
    """[B, Hkv, G, Dv] in the dtype of `query` [B, Hkv, G, D]."""
    batch, heads, group, _ = query.shape
    axis, slots, queries, width = partials.out.shape
    out = torch.empty(batch, heads, group, width, dtype=query.dtype, device=query.device) if out is None else out
    units = partials.counts.numel()
    with device_of(query):
        merge_kernel[(batch * heads * group, triton.cdiv(width, COLUMNS))](
            out,
            partials.out,
            partials.lse,
            partials.counts,
            units,
            partials.most,
            partials.splits,
            slots,
            axis,
            out if sink_logits is None else sink_logits.contiguous(),
            heads * group,
            SINK_LOGITS=sink_logits is not None,
            QUERIES=queries,
            DV=width,
            COLUMNS=COLUMNS,
            PARTS_TILE=PARTS_TILE,
            UNITS=units_tile(units),
            TOKEN_TILE=partials.token_tile,
            num_warps=4,
        )
    return out
