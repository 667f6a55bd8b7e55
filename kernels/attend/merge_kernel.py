"""The reduction: partials of any origin, and the model's sinks, into one attention output. One launch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import device_of
from .launch import units_tile
from .plan import slots_of_plan
from .shapes import Partial
from .tile import LOG2E, NONE

COLUMNS = 32
"""Of the values per program: 128 bytes of every partial, so that few queries still make many programs."""
PARTS_TILE = 64


@dataclass(frozen=True)
class Planned:
    """Partials that lie slot by slot, as `tile.plan` dealt the slots out."""

    out: Tensor
    """[axis, slots, queries, Dv] float32; the groups of a unit are on the first axis."""
    lse: Tensor
    counts: Tensor
    """[units] int32"""
    most: int
    splits: int
    token_tile: int


@triton.jit
def absorb_parts(
    best, mass, total, out_ptr, lse_ptr, parts, out_step, lse_step, column, DV: tl.constexpr, TILE: tl.constexpr
):
    """`parts` partials of one query into the running softmax."""
    for first in range(0, parts, TILE):
        part = first + tl.arange(0, TILE)
        inside = (part < parts)[:, None] & (column < DV)[None, :]
        lse = tl.load(lse_ptr + part * lse_step, mask=part < parts, other=NONE) * LOG2E
        out = tl.load(out_ptr + part[:, None] * out_step + column[None, :], mask=inside, other=0.0)
        out = tl.where((lse == NONE)[:, None], 0.0, out)
        risen = tl.maximum(best, tl.max(lse, 0))
        shift = tl.where(risen == NONE, 0.0, risen)
        weights = tl.exp2(lse - shift)
        fade = tl.exp2(best - shift)
        mass = mass * fade + tl.sum(weights, 0)
        total = total * fade + tl.sum(weights[:, None] * out, 0)
        best = risen
    return best, mass, total


@triton.jit(do_not_specialize=["units", "most", "splits", "slots", "per_unit"])
def merge_kernel(
    out_ptr,
    own_out_ptr,
    own_lse_ptr,
    counts_ptr,
    units,
    most,
    splits,
    slots,
    per_unit,
    sinks_ptr,
    query_heads,
    extra_out,
    extra_lse,
    extra_parts,
    extra_steps,
    OWN: tl.constexpr,
    EXTRA: tl.constexpr,
    SINKS: tl.constexpr,
    QUERIES: tl.constexpr,
    GROUP: tl.constexpr,
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
    if OWN:
        group = query // QUERIES
        first, parts = slots_of_plan(counts_ptr, group // per_unit, units, most, splits, UNITS, TOKEN_TILE)
        row = ((group % per_unit) * slots + first).to(tl.int64) * QUERIES + query % QUERIES
        best, mass, total = absorb_parts(
            best,
            mass,
            total,
            own_out_ptr + row * DV,
            own_lse_ptr + row,
            parts,
            QUERIES * DV,
            QUERIES,
            column,
            DV,
            PARTS_TILE,
        )
    for number in tl.static_range(EXTRA):
        steps = extra_steps[number]
        pair = (query // GROUP).to(tl.int64)
        member = query % GROUP
        best, mass, total = absorb_parts(
            best,
            mass,
            total,
            extra_out[number] + pair * steps[0] + member * steps[1],
            extra_lse[number] + pair * steps[3] + member * steps[4],
            extra_parts[number],
            steps[2],
            steps[5],
            column,
            DV,
            PARTS_TILE,
        )
    if SINKS:
        sink = tl.load(sinks_ptr + query % query_heads).to(tl.float32) * LOG2E
        risen = tl.maximum(best, sink)
        shift = tl.where(risen == NONE, 0.0, risen)
        fade = tl.exp2(best - shift)
        mass = mass * fade + tl.exp2(sink - shift)
        total = total * fade
    total = total / tl.where(mass == 0, 1.0, mass)
    tl.store(out_ptr + query.to(tl.int64) * DV + column, total.to(out_ptr.dtype.element_ty), mask=column < DV)


def merge(
    own: Planned | None, extra: Sequence[Partial], sinks: Tensor | None, query: Tensor, width: int, out: Tensor | None
) -> Tensor:
    """[B, Hkv, G, Dv] in the dtype of `query` [B, Hkv, G, D]."""
    batch, heads, group, _ = query.shape
    out = torch.empty(batch, heads, group, width, dtype=query.dtype, device=query.device) if out is None else out
    flat = [(part.flatten(0, 1), lse.flatten(0, 1)) for part, lse in extra if lse.shape[-1]]
    flat = [(part if part.stride(-1) == 1 else part.contiguous(), lse) for part, lse in flat]
    listed = flat or [(out.flatten(0, 1).unsqueeze(2), out[..., 0].flatten(0, 1).unsqueeze(2))]  # no empty tuples
    units = own.counts.numel() if own else 1
    with device_of(query):
        merge_kernel[(batch * heads * group, triton.cdiv(width, COLUMNS))](
            out,
            own.out if own else out,
            own.lse if own else out,
            own.counts if own else out,
            units,
            own.most if own else 0,
            own.splits if own else 1,
            own.out.shape[1] if own else 0,
            own.out.shape[0] if own else 1,
            out if sinks is None else sinks.contiguous(),
            heads * group,
            tuple(part for part, _ in listed),
            tuple(lse for _, lse in listed),
            tuple(lse.shape[-1] for _, lse in listed),
            tuple((*part.stride()[:3], *lse.stride()) for part, lse in listed),
            OWN=own is not None,
            EXTRA=len(flat),
            SINKS=sinks is not None,
            QUERIES=own.out.shape[2] if own else group,
            GROUP=group,
            DV=width,
            COLUMNS=COLUMNS,
            PARTS_TILE=PARTS_TILE,
            UNITS=units_tile(units),
            TOKEN_TILE=own.token_tile if own else 16,
            num_warps=4,
        )
    return out
