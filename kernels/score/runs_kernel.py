"""Scores of candidates: each program finds its candidates' slots by halving, then goes on as `triton_kernel`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import device_of, interpreting
from .triton_kernel import COLUMNS, PROGRAMS, TINY, finished, part_of, prepared, unpacked

BLOCK, WARPS = 128, 4
"""Candidates of a tile: one for each thread while their slots are looked for."""
VARYING = [
    "heads", "runs", "steps", "capacity", "per_program", "query_row", "query_head",
    "bias_row", "bias_head", "codes_row", "codes_head", "scales_row", "scales_head", "scales_token",
]  # fmt: skip


@triton.jit
def slot_of(candidate, starts, ends, runs, steps, first):
    """The slot of each candidate: in the first run whose end is above it, or after all runs, from slot `first` on.

    Args: steps: halvings that leave one of `runs`: their number's bits.
    """
    low = tl.zeros_like(candidate)
    high = low + runs
    for _ in range(steps):
        middle = (low + high) // 2
        inside = low < high
        beyond = tl.load(ends + middle, mask=inside, other=0) <= candidate
        high = tl.where(inside & ~beyond, middle, high)
        low = tl.where(inside & beyond, middle + 1, low)
    before = tl.load(ends + low - 1, mask=low > 0, other=0)
    start = tl.load(starts + low, mask=low < runs, other=0)
    return candidate - before + tl.where(low < runs, start, first)


@triton.jit(do_not_specialize=VARYING)
def score_runs_kernel(
    query, codes, scales, starts, ends, begins, finishes, bias, out, best,
    heads, runs, steps, capacity, per_program, scaling, softcap,
    query_row: tl.int64, query_head: tl.int64, query_stride: tl.int64,
    bias_row: tl.int64, bias_head: tl.int64, bias_stride: tl.int64,
    codes_row: tl.int64, codes_head: tl.int64, scales_row: tl.int64, scales_head: tl.int64, scales_token: tl.int64,
    CODES_TOKEN: tl.constexpr, UNIT: tl.constexpr, SHARING: tl.constexpr, QUERIES: tl.constexpr,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, BITS: tl.constexpr, RUNS: tl.constexpr,
    BIASED: tl.constexpr, OWN: tl.constexpr, BEST: tl.constexpr, SOFTCAP: tl.constexpr, LARGEST: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: consecutive tiles of the candidates of one group; SHARING groups have the same codes."""
    group = tl.program_id(0)
    pair, member = group // SHARING, group % SHARING
    row, head = pair // heads, pair % heads
    begin = tl.load(begins + row)
    total = tl.maximum(tl.load(finishes + row) - begin, 0)
    if RUNS:
        starts += pair.to(tl.int64) * runs
        ends += group.to(tl.int64) * runs
        total += tl.load(ends + runs - 1)
    total = tl.minimum(total, capacity)
    tile = tl.program_id(1) * per_program
    last = tl.minimum(tile + per_program, tl.cdiv(capacity, BLOCK))
    live = tl.maximum(tl.minimum(last, tl.cdiv(total, BLOCK)), tile)
    position = tl.arange(0, BLOCK)
    column = tl.arange(0, COLUMNS)
    out += group.to(tl.int64) * QUERIES * capacity
    best += group.to(tl.int64) * capacity

    dim = tl.arange(0, PADDED)
    inside = (dim < WIDTH)[:, None]
    asked = member + column % QUERIES
    query += row * query_row + head * query_head + asked[None, :] * query_stride + dim[:, None]
    shift = tl.zeros([COLUMNS], tl.float32)
    if BIASED:
        bias += row * bias_row + head * bias_head
        shift = tl.load(bias + asked * bias_stride)
        if not SOFTCAP:
            shift -= tl.max(tl.load(bias + column % (SHARING * QUERIES) * bias_stride), 0)
        shift *= scaling
    start = tl.zeros([BLOCK, COLUMNS], dtype=tl.float32)
    first, norm = part_of(query, inside, 0, WIDTH)
    if BITS <= 4:
        second, largest = part_of(query, inside, 1, WIDTH)
        norm = tl.maximum(norm, largest)
    if BITS == 2:
        third, largest = part_of(query, inside, 2, WIDTH)
        norm = tl.maximum(norm, largest)
        fourth, largest = part_of(query, inside, 3, WIDTH)
        norm = tl.maximum(norm, largest)
    norm = tl.maximum(norm, TINY) / 256.0
    if BITS == 8:
        first, start = prepared(first, norm, start, 1.0, 1152.0)
    elif BITS == 4:
        first, start = prepared(first, norm, start, 1.0, 1032.0)
        second, start = prepared(second, norm, start, 16.0, 1152.0)
    else:
        first, start = prepared(first, norm, start, 1.0, 1025.5)
        second, start = prepared(second, norm, start, 4.0, 1030.0)
        third, start = prepared(third, norm, start, 16.0, 1048.0)
        fourth, start = prepared(fourth, norm, start, 64.0, 1120.0)
    scaling *= norm
    codes += (row * codes_row + head * codes_head) * UNIT
    scales += row * scales_row + head * scales_head
    for block in range(tile, live):
        candidate = block * BLOCK + position
        present = candidate < total
        if RUNS:
            slot = slot_of(candidate, starts, ends, runs, steps, begin)
        else:
            slot = begin + candidate
        readable = present[:, None] & (dim < WIDTH)[None, :]
        numbers = tl.load(codes + slot[:, None] * CODES_TOKEN + dim[None, :], mask=readable, other=0)
        factor = tl.load(scales + slot * scales_token, mask=present, other=0.0).to(tl.float32) * scaling
        logit = tl.dot(unpacked(numbers, 0, BITS, DTYPE), first, acc=start)
        if BITS <= 4:
            logit = tl.dot(unpacked(numbers, 1, BITS, DTYPE), second, acc=logit)
        if BITS == 2:
            logit = tl.dot(unpacked(numbers, 2, BITS, DTYPE), third, acc=logit)
            logit = tl.dot(unpacked(numbers, 3, BITS, DTYPE), fourth, acc=logit)
        logit = finished(logit * factor[:, None] + shift[None, :], present[:, None], softcap, SOFTCAP, LARGEST)
        if OWN:
            to = out + column[None, :] * capacity.to(tl.int64) + candidate[:, None]
            room = (candidate < capacity)[:, None] & (column < QUERIES)[None, :]
            tl.store(to, logit.to(out.dtype.element_ty), mask=room)
        if BEST:  # columns beyond the group repeat its queries
            tl.store(best + candidate, tl.max(logit, 1).to(best.dtype.element_ty), mask=candidate < capacity)

    for block in range(live, last):
        candidate = block * BLOCK + position
        if OWN:
            for line in range(QUERIES):
                to = out + line * capacity.to(tl.int64) + candidate
                tl.store(to, tl.full([BLOCK], float("-inf"), out.dtype.element_ty), mask=candidate < capacity)
        if BEST:
            absent = tl.full([BLOCK], float("-inf"), best.dtype.element_ty)
            tl.store(best + candidate, absent, mask=candidate < capacity)


def score_runs(
    query: Tensor,
    codes: Tensor,
    scales: Tensor,
    starts: Tensor | None,
    ends: Tensor | None,
    begin: Tensor,
    end: Tensor,
    bias: Tensor | None,
    out: Tensor | None,
    best: Tensor | None,
    *,
    scaling: float,
    bits: int,
    softcap: float | None,
) -> None:
    """Writes `out` and `best`, already checked; see `kvcal.kernels.score.score_runs`."""
    batch, heads, group, _ = query.shape
    tokens, width = codes.shape[2:]
    if tokens * codes.stride(2) >= 2**31:
        raise ValueError(f"codes: received {tokens} tokens of stride {codes.stride(2)}, expected a product below 2^31")
    either = out if best is None else best
    assert either is not None
    capacity = either.shape[-1]
    sharing = group if ends is not None and ends.dim() == 4 else 1
    unit = 16 // codes.element_size()
    unit = 1 if codes.stride(0) % unit or codes.stride(1) % unit else unit
    runs = 0 if ends is None else ends.shape[-1]
    groups, blocks = batch * heads * sharing, triton.cdiv(capacity, BLOCK)
    per_program = min(max(triton.cdiv(blocks * groups, PROGRAMS), 1), 16)
    with device_of(query):
        score_runs_kernel[(groups, triton.cdiv(blocks, per_program))](
            query, codes, scales, starts, ends, begin.contiguous(), end.contiguous(), bias,
            either if out is None else out, either if best is None else best,
            heads, runs, runs.bit_length(), capacity, per_program, scaling, softcap or 1.0,
            *query.stride()[:3], *((0, 0, 0) if bias is None else bias.stride()),
            codes.stride(0) // unit, codes.stride(1) // unit, *scales.stride(),
            CODES_TOKEN=codes.stride(2), UNIT=unit, SHARING=sharing, QUERIES=group // sharing,
            COLUMNS=max(COLUMNS, triton.next_power_of_2(group)), WIDTH=width,
            PADDED=max(16, triton.next_power_of_2(width)), BITS=bits, RUNS=ends is not None, BIASED=bias is not None,
            OWN=out is not None, BEST=best is not None, SOFTCAP=softcap is not None,
            LARGEST=torch.finfo(either.dtype).max, DTYPE=tl.float32 if interpreting() else tl.float16,
            BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
