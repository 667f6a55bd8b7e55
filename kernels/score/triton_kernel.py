"""One pass over the index: every code is read once, for all queries of its group. README.md derives the choices."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import device_of, interpreting

LOG2_E = tl.constexpr(1.4426950408889634)
TINY = tl.constexpr(1e-30)
COLUMNS = 8
"""The narrowest tile of queries that the matrix instruction takes."""
WARPS = 4
RUN = 8
"""Tokens whose scales or scores are read and written together: 16 bytes of float16."""
PROGRAMS = 1056
"""Programs that a launch aims at: 8 on each of 132 multiprocessors."""
VARYING = ["runs", "per_program", "codes_row", "codes_head", "scales_row", "scales_head"]
"""What grows with the capacity of a cache, and must not compile the kernel again."""


@triton.jit
def unpacked(codes, FIELD: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Codes as loaded -> numbers: 8 bits: 1152 + code; fields of fewer bits: 1024 + 2^(FIELD · BITS) · code.

    An integer below 1024 in the last bits of 0x6400 is the float16 number 1024 + integer: one logical operation.
    The bytes are widened before anything else, for then the compiler moves bytes, not numbers, between threads.
    """
    if BITS == 16:
        numbers = codes.to(DTYPE)
    elif BITS == 8:
        numbers = (codes.to(tl.uint8, bitcast=True).to(tl.uint16) ^ 0x6480).to(tl.float16, bitcast=True)
    else:
        MASK: tl.constexpr = ((1 << BITS) - 1) << (FIELD * BITS)
        numbers = ((codes.to(tl.uint16) & MASK) | 0x6400).to(tl.float16, bitcast=True)
    return numbers


@triton.jit
def part_of(query, inside, FIELD: tl.constexpr, WIDTH: tl.constexpr):
    """The queries' dimensions that one field of the codes has, float32, and their largest magnitude."""
    part = tl.load(query + FIELD * WIDTH, mask=inside, other=0.0).to(tl.float32)
    return part, tl.max(tl.abs(part))


@triton.jit
def prepared(part, norm, start, WEIGHT: tl.constexpr, ZERO: tl.constexpr):
    """The part in float16, as `unpacked` numbers of this weight want it; and the start less what these add to it."""
    part = (part / (WEIGHT * norm)).to(tl.float16)
    return part, start - ZERO * tl.sum(part.to(tl.float32), 0)[None, :]


@triton.jit
def finished(logit, present, softcap, SOFTCAP: tl.constexpr, LARGEST: tl.constexpr):
    if SOFTCAP:  # tanh(x) = 1 - 2 / (1 + e^2x), without overflow at either end
        logit = softcap * (1.0 - 2.0 / (1.0 + tl.exp2(logit * (2.0 * LOG2_E) / softcap)))
    logit = tl.minimum(tl.maximum(logit, -LARGEST), LARGEST)
    return tl.where(present, logit, float("-inf"))


@triton.jit(do_not_specialize=VARYING)
def score_kernel(
    query, codes, scales, lengths, out, runs, per_program, scaling, softcap,
    query_row: tl.int64, query_head: tl.int64, query_stride: tl.int64,
    codes_row: tl.int64, codes_head: tl.int64, scales_row: tl.int64, scales_head: tl.int64,
    CODES_TOKEN: tl.constexpr, UNIT: tl.constexpr, RUN: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, COMBINE: tl.constexpr,
    SOFTCAP: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tokens = runs * RUN
    head, row = tl.program_id(1), tl.program_id(2)
    pair = (row * tl.num_programs(1) + head).to(tl.int64)
    length = tl.minimum(tl.load(lengths + row), tokens)
    blocks = tl.cdiv(tokens, BLOCK)
    begin = tl.program_id(0) * per_program
    end = tl.minimum(begin + per_program, blocks)
    live = tl.maximum(tl.minimum(end, tl.cdiv(length, BLOCK)), begin)
    position = tl.arange(0, BLOCK)

    # Columns beyond the group repeat its queries, so that a maximum over columns needs no mask.
    column = tl.arange(0, COLUMNS)
    dim = tl.arange(0, PADDED)
    inside = (dim < WIDTH)[:, None]
    query += row * query_row + head * query_head + (column % GROUP)[None, :] * query_stride + dim[:, None]
    start = tl.zeros([BLOCK, COLUMNS], dtype=tl.float32)
    if BITS == 16:
        first = tl.load(query, mask=inside, other=0.0).to(DTYPE)
    else:
        # The queries in float16, the largest number 256; what `unpacked` adds to the codes is taken off in advance.
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
        scales += (row * scales_row + head * scales_head) * RUN

    codes += (row * codes_row + head * codes_head) * UNIT
    for block in tl.range(begin, live, num_stages=STAGES):
        token = block * BLOCK + position
        run = token // RUN * RUN  # a run is read, and written, as a whole or not at all
        present = token < length
        readable = (run < length)[:, None] & (dim < WIDTH)[None, :]
        tile = tl.load(codes + token[:, None] * CODES_TOKEN + dim[None, :], mask=readable, other=0)
        logit = tl.dot(unpacked(tile, 0, BITS, DTYPE), first, acc=start, input_precision="ieee")
        if BITS <= 4:
            logit = tl.dot(unpacked(tile, 1, BITS, DTYPE), second, acc=logit)
        if BITS == 2:
            logit = tl.dot(unpacked(tile, 2, BITS, DTYPE), third, acc=logit)
            logit = tl.dot(unpacked(tile, 3, BITS, DTYPE), fourth, acc=logit)
        factor = tl.full([BLOCK], 1.0, tl.float32) * scaling
        if BITS != 16:
            factor *= tl.load(scales + token, mask=run < length, other=0.0).to(tl.float32)
        if COMBINE:  # the factor is not negative and the softcap monotone: the largest product stays the largest
            logit = finished(tl.max(logit, 1) * factor, present, softcap, SOFTCAP, LARGEST).to(out.dtype.element_ty)
            tl.store(out + pair * tokens + token, logit, mask=run < tokens)
        else:
            logit = finished(logit * factor[:, None], present[:, None], softcap, SOFTCAP, LARGEST)
            to = out + (pair * GROUP + column)[None, :] * tokens + token[:, None]
            tl.store(to, logit.to(out.dtype.element_ty), mask=(run < tokens)[:, None] & (column < GROUP)[None, :])

    lines = 1 if COMBINE else GROUP
    for block in range(live, end):
        token = block * BLOCK + position
        for line in range(lines):
            to = out + (pair * lines + line) * tokens + token
            tl.store(to, tl.full([BLOCK], float("-inf"), out.dtype.element_ty), mask=token // RUN * RUN < tokens)


def score(
    query: Tensor,
    codes: Tensor,
    scales: Tensor | None,
    lengths: Tensor,
    out: Tensor,
    *,
    scaling: float,
    bits: int,
    combine: str,
    softcap: float | None,
    block: int,
) -> None:
    """Writes `out`, already checked; see `kvcal.kernels.score.score`."""
    batch, heads, group, _ = query.shape
    tokens, width = codes.shape[2:]
    if tokens * codes.stride(2) >= 2**31:
        raise ValueError(f"codes: received {tokens} tokens of stride {codes.stride(2)}, expected a product below 2^31")
    padded = max(16, triton.next_power_of_2(width))
    scale_strides = (0, 0) if scales is None else scales.stride()[:2]
    # Strides in units of 16 bytes, where they are multiples: the compiler then knows every row to be aligned.
    unit = 16 // codes.element_size()
    unit = 1 if codes.stride(0) % unit or codes.stride(1) % unit else unit
    run = 1 if tokens % RUN or scale_strides[0] % RUN or scale_strides[1] % RUN else RUN
    blocks = triton.cdiv(tokens, block)
    per_program = min(max(triton.cdiv(blocks * heads * batch, PROGRAMS), 1), 16)
    dtype = tl.float32 if interpreting() else getattr(tl, str(query.dtype).removeprefix("torch."))
    with device_of(query):
        score_kernel[(triton.cdiv(blocks, per_program), heads, batch)](
            query, codes, scales, lengths, out, tokens // run, per_program, scaling, softcap or 1.0,
            *query.stride()[:3], codes.stride(0) // unit, codes.stride(1) // unit,
            scale_strides[0] // run, scale_strides[1] // run,
            CODES_TOKEN=codes.stride(2), UNIT=unit, RUN=run, GROUP=group,
            COLUMNS=max(COLUMNS, triton.next_power_of_2(group)), WIDTH=width, PADDED=padded,
            BITS=bits, DTYPE=dtype, COMBINE=combine == "max", SOFTCAP=softcap is not None,
            LARGEST=torch.finfo(out.dtype).max,
            BLOCK=block, STAGES=stages(block * padded * codes.element_size()), num_warps=WARPS,
        )  # fmt: skip


def stages(tile: int) -> int:
    """Depth of the pipeline by a tile's bytes: 12 KB or more on their way per program, within 48 KB of buffers."""
    return 4 if tile <= 4096 else 3 if tile <= 16384 else 2
