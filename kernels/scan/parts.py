"""A program's partial result, and how the last program of a head joins them all."""

import triton
import triton.language as tl

from .tile import LOG2E, NONE

QUERIES = tl.constexpr(16)
"""Queries of a tile, the group filled up: the fewest rows that a tensor core multiplies."""


@triton.jit
def leave_part(
    part_ptr, turned_part_ptr, lse_ptr, slot, best, mass, total, total_turned, GROUP: tl.constexpr, DV: tl.constexpr,
    DV_TILE: tl.constexpr, CODED: tl.constexpr,
):  # fmt: skip
    """A program's partial result: sums divided by their mass, and the logarithm of it; zeros and -inf of nothing."""
    query, dim = tl.arange(0, QUERIES), tl.arange(0, DV_TILE)
    divisor = tl.where(mass == 0, 1.0, mass)
    inside = (query < GROUP)[:, None] & (dim < DV)[None, :]
    to = (slot * GROUP + query)[:, None] * DV + dim[None, :]
    tl.store(part_ptr + to, total / divisor[:, None], mask=inside)
    if CODED:
        tl.store(turned_part_ptr + to, total_turned / divisor[:, None], mask=inside)
    lse = tl.where(mass == 0, NONE, best + tl.log2(divisor))
    tl.store(lse_ptr + slot * GROUP + query, lse, mask=query < GROUP)


@triton.jit
def join(
    part_ptr, turned_part_ptr, lse_ptr, slot, parts, sink_logits_ptr, turn_ptr, out_ptr,
    GROUP: tl.constexpr, DV: tl.constexpr, DV_TILE: tl.constexpr, CODED: tl.constexpr, SINK_LOGITS: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """The output of one head, from the partial results in slots `slot` and following."""
    dim, number, row = tl.arange(0, DV_TILE), tl.arange(0, PARTS), tl.arange(0, QUERIES)
    joined = tl.zeros([QUERIES, DV_TILE], tl.float32)
    for query in tl.static_range(GROUP):
        best = tl.full([], NONE, tl.float32)
        mass = tl.full([], 0.0, tl.float32)
        total = tl.zeros([DV_TILE], tl.float32)
        turned = tl.zeros([DV_TILE], tl.float32)
        for at in range(0, parts, PARTS):
            valid = at + number < parts
            index = (slot + at + number) * GROUP + query
            # Other multiprocessors wrote these: .cg reads them where they meet, in L2.
            lse = tl.load(lse_ptr + index, mask=valid, other=NONE, cache_modifier=".cg")
            to = index[:, None] * DV + dim[None, :]
            inside = valid[:, None] & (dim < DV)[None, :]
            found = tl.load(part_ptr + to, mask=inside, other=0.0, cache_modifier=".cg")
            risen = tl.maximum(best, tl.max(lse, 0))
            shift = tl.where(risen == NONE, 0.0, risen)
            share, fade = tl.exp2(lse - shift), tl.exp2(best - shift)
            best, mass = risen, mass * fade + tl.sum(share, 0)
            total = total * fade + tl.sum(share[:, None] * found, 0)
            if CODED:
                found = tl.load(turned_part_ptr + to, mask=inside, other=0.0, cache_modifier=".cg")
                turned = turned * fade + tl.sum(share[:, None] * found, 0)
        if SINK_LOGITS:
            sink = tl.load(sink_logits_ptr + query).to(tl.float32) * LOG2E
            risen = tl.maximum(best, sink)
            shift = tl.where(risen == NONE, 0.0, risen)
            fade = tl.exp2(best - shift)
            mass, total, turned = mass * fade + tl.exp2(sink - shift), total * fade, turned * fade
        divisor = tl.where(mass == 0, 1.0, mass)
        total = total / divisor
        if CODED:  # its place among the partial results is free now
            tl.store(turned_part_ptr + (slot * GROUP + query) * DV + dim, turned / divisor, mask=dim < DV)
            joined += tl.where((row == query)[:, None], total[None, :], 0.0)
        else:
            tl.store(out_ptr + query * DV + dim, total.to(out_ptr.dtype.element_ty), mask=dim < DV)
    if CODED:
        tl.debug_barrier()  # what follows reads the rotated sums
        held = (row < GROUP)[:, None]
        for at in range(0, DV, 16):
            place = at + tl.arange(0, 16)
            from_ptr = turned_part_ptr + (slot * GROUP + row)[:, None] * DV + place[None, :]
            rotated = tl.load(from_ptr, mask=held & (place < DV)[None, :], other=0.0)
            inside = (place < DV)[:, None] & (dim < DV)[None, :]
            turn = tl.load(turn_ptr + place[:, None] * DV + dim[None, :], mask=inside, other=0.0)
            joined = tl.dot(rotated, turn, joined, input_precision="tf32x3")
        to = out_ptr + row[:, None] * DV + dim[None, :]
        tl.store(to, joined.to(out_ptr.dtype.element_ty), mask=held & (dim < DV)[None, :])
