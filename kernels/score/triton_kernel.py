"""One pass over the index: every entry is read once, for all queries of its group. README.md derives the choices."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import device_of, interpreting

LOG2_E = tl.constexpr(1.4426950408889634)
COLUMNS = 8
"""The narrowest tile of queries that the matrix instruction takes."""
WARPS = 4
RUN = 8
"""Tokens whose scores are written together: 16 bytes of float16."""
PROGRAMS = 1056
"""Programs that a launch aims at: 8 on each of 132 multiprocessors."""
VARYING = ["runs", "per_program", "index_row", "index_head"]
"""What grows with the capacity of a cache, and must not compile the kernel again."""


@triton.jit
def finished(logit, present, softcap, SOFTCAP: tl.constexpr, LARGEST: tl.constexpr):
    if SOFTCAP:  # tanh(x) = 1 - 2 / (1 + e^2x), without overflow at either end
        logit = softcap * (1.0 - 2.0 / (1.0 + tl.exp2(logit * (2.0 * LOG2_E) / softcap)))
    logit = tl.minimum(tl.maximum(logit, -LARGEST), LARGEST)
    return tl.where(present, logit, float("-inf"))


@triton.jit(do_not_specialize=VARYING)
def score_kernel(
    query, index, lengths, out, runs, per_program, scaling, softcap,
    query_row: tl.int64, query_head: tl.int64, query_stride: tl.int64, index_row: tl.int64, index_head: tl.int64,
    INDEX_TOKEN: tl.constexpr, UNIT: tl.constexpr, RUN: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr,
    RANK: tl.constexpr, PADDED: tl.constexpr, DTYPE: tl.constexpr, COMBINE: tl.constexpr,
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
    query += row * query_row + head * query_head + (column % GROUP)[None, :] * query_stride + dim[:, None]
    queries = tl.load(query, mask=(dim < RANK)[:, None], other=0.0).to(DTYPE)

    index += (row * index_row + head * index_head) * UNIT
    for block in tl.range(begin, live, num_stages=STAGES):
        token = block * BLOCK + position
        run = token // RUN * RUN  # a run is read, and written, as a whole or not at all
        present = token < length
        readable = (run < length)[:, None] & (dim < RANK)[None, :]
        tile = tl.load(index + token[:, None] * INDEX_TOKEN + dim[None, :], mask=readable, other=0)
        logit = tl.dot(tile.to(DTYPE), queries, input_precision="ieee")
        if COMBINE:  # scaling is positive and the softcap monotone: the largest product stays the largest
            logit = finished(tl.max(logit, 1) * scaling, present, softcap, SOFTCAP, LARGEST).to(out.dtype.element_ty)
            tl.store(out + pair * tokens + token, logit, mask=run < tokens)
        else:
            logit = finished(logit * scaling, present[:, None], softcap, SOFTCAP, LARGEST)
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
    index: Tensor,
    lengths: Tensor,
    out: Tensor,
    *,
    scaling: float,
    combine: str,
    softcap: float | None,
    block: int,
) -> None:
    """Writes `out`, already checked; see `kvcal.kernels.score.score`."""
    batch, heads, group, rank = query.shape
    tokens = index.shape[2]
    if tokens * index.stride(2) >= 2**31:
        raise ValueError(f"index: received {tokens} tokens of stride {index.stride(2)}, expected a product below 2^31")
    padded = max(16, triton.next_power_of_2(rank))
    # Strides in units of 16 bytes, where they are multiples: the compiler then knows every row to be aligned.
    unit = 16 // index.element_size()
    unit = 1 if index.stride(0) % unit or index.stride(1) % unit else unit
    run = 1 if tokens % RUN else RUN
    blocks = triton.cdiv(tokens, block)
    per_program = min(max(triton.cdiv(blocks * heads * batch, PROGRAMS), 1), 16)
    dtype = tl.float32 if interpreting() else getattr(tl, str(query.dtype).removeprefix("torch."))
    with device_of(query):
        score_kernel[(triton.cdiv(blocks, per_program), heads, batch)](
            query, index, lengths, out, tokens // run, per_program, scaling, softcap or 1.0,
            *query.stride()[:3], index.stride(0) // unit, index.stride(1) // unit,
            INDEX_TOKEN=index.stride(2), UNIT=unit, RUN=run, GROUP=group,
            COLUMNS=max(COLUMNS, triton.next_power_of_2(group)), RANK=rank, PADDED=padded, DTYPE=dtype,
            COMBINE=combine == "max", SOFTCAP=softcap is not None, LARGEST=torch.finfo(out.dtype).max,
            BLOCK=block, STAGES=stages(block * padded * index.element_size()), num_warps=WARPS,
        )  # fmt: skip


def stages(tile: int) -> int:
    """Depth of the pipeline by a tile's bytes: 12 KB or more on their way per program, within 48 KB of buffers."""
    return 4 if tile <= 4096 else 3 if tile <= 16384 else 2
