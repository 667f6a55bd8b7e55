"""One pass over the reduced keys: each is read once, for all queries of its group. README.md derives the choices."""

import triton
import triton.language as tl
from torch import Tensor

from .. import pages
from ..backend import device_of, interpreting
from ..pages.table import capacity_of

LOG2_E = tl.constexpr(1.4426950408889634)
LARGEST = tl.constexpr(3.4028234663852886e38)
"""float32's largest number, to which products that overflow are clamped."""
COLUMNS = 8
"""The narrowest tile of queries that the matrix instruction takes."""
WARPS = 4
RUN = 8
"""Tokens whose scores are written together."""
PROGRAMS = 1056
"""Programs that a launch aims at: 8 on each of 132 multiprocessors."""
VARYING = ["runs", "per_program", "key_sequence", "key_head", "table", "table_sequence"]
"""What grows with the capacity of a cache, and must not compile the kernel again."""


@triton.jit
def finished(logit, present, softcap, SOFTCAP: tl.constexpr):
    if SOFTCAP:  # tanh(x) = 1 - 2 / (1 + e^2x), without overflow at either end
        logit = softcap * (1.0 - 2.0 / (1.0 + tl.exp2(logit * (2.0 * LOG2_E) / softcap)))
    logit = tl.minimum(tl.maximum(logit, -LARGEST), LARGEST)
    return tl.where(present, logit, float("-inf"))


@triton.jit(do_not_specialize=VARYING)
def score_kernel(
    query, key, lengths, table, out, runs, per_program, scaling, softcap,
    query_sequence: tl.int64, query_head: tl.int64, query_stride: tl.int64, key_sequence: tl.int64, key_head: tl.int64,
    table_sequence,
    KEY_TOKEN: tl.constexpr, UNIT: tl.constexpr, RUN: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr,
    RANK: tl.constexpr, PADDED: tl.constexpr, DTYPE: tl.constexpr,
    SOFTCAP: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, PAGED: tl.constexpr,
):  # fmt: skip
    tokens = runs * RUN
    head, sequence = tl.program_id(1), tl.program_id(2)
    pair = (sequence * tl.num_programs(1) + head).to(tl.int64)
    length = tl.minimum(tl.load(lengths + sequence), tokens)
    blocks = tl.cdiv(tokens, BLOCK)
    begin = tl.program_id(0) * per_program
    end = tl.minimum(begin + per_program, blocks)
    live = tl.maximum(tl.minimum(end, tl.cdiv(length, BLOCK)), begin)
    position = tl.arange(0, BLOCK)

    # Columns beyond the group repeat its queries, so that loading them needs no mask.
    column = tl.arange(0, COLUMNS)
    dim = tl.arange(0, PADDED)
    query += sequence * query_sequence + head * query_head + (column % GROUP)[None, :] * query_stride + dim[:, None]
    queries = tl.load(query, mask=(dim < RANK)[:, None], other=0.0).to(DTYPE)

    if PAGED:
        key += head * key_head * UNIT
        table += sequence.to(tl.int64) * table_sequence
        page = tl.load(table + begin, mask=begin < live, other=0)
    else:
        key += (sequence * key_sequence + head * key_head) * UNIT
    for block in tl.range(begin, live, num_stages=STAGES):
        token = block * BLOCK + position
        run = token // RUN * RUN  # a run is read, and written, as a whole or not at all
        present = token < length
        readable = (run < length)[:, None] & (dim < RANK)[None, :]
        if PAGED:  # a block is a page, whose number the turn before loaded
            keys = key + page.to(tl.int64) * key_sequence * UNIT + position[:, None] * KEY_TOKEN + dim[None, :]
            page = tl.load(table + block + 1, mask=block + 1 < live, other=0)
        else:
            keys = key + token[:, None] * KEY_TOKEN + dim[None, :]
        tile = tl.load(keys, mask=readable, other=0)
        logit = tl.dot(tile.to(DTYPE), queries, input_precision="ieee")
        logit = finished(logit * scaling, present[:, None], softcap, SOFTCAP)
        to = out + (pair * GROUP + column)[None, :] * tokens + token[:, None]
        tl.store(to, logit, mask=(run < tokens)[:, None] & (column < GROUP)[None, :])

    for block in range(live, end):
        token = block * BLOCK + position
        for line in range(GROUP):
            to = out + (pair * GROUP + line) * tokens + token
            tl.store(to, tl.full([BLOCK], float("-inf"), tl.float32), mask=token // RUN * RUN < tokens)


def score(
    query: Tensor,
    key: Tensor,
    lengths: Tensor,
    out: Tensor,
    *,
    scaling: float,
    softcap: float | None,
    block: int,
    table: Tensor | None,
) -> None:
    """Writes `out`, already checked; see `kvcal.kernels.score.score`."""
    batch, heads, group, rank = query.shape
    tokens, block = capacity_of(key, table), block if table is None else pages.PAGE
    if key.shape[2] * key.stride(2) >= 2**31:
        raise ValueError(
            f"key: received {key.shape[2]} tokens of stride {key.stride(2)}, expected a product below 2^31"
        )
    padded = max(16, triton.next_power_of_2(rank))
    # Strides in units of 16 bytes, where they are multiples: the compiler then knows every key to be aligned.
    unit = 16 // key.element_size()
    unit = 1 if key.stride(0) % unit or key.stride(1) % unit else unit
    run = 1 if tokens % RUN else RUN
    blocks = triton.cdiv(tokens, block)
    per_program = min(max(triton.cdiv(blocks * heads * batch, PROGRAMS), 1), 16)
    dtype = tl.float32 if interpreting() else getattr(tl, str(query.dtype).removeprefix("torch."))
    with device_of(query):
        score_kernel[(triton.cdiv(blocks, per_program), heads, batch)](
            query, key, lengths, table, out, tokens // run, per_program, scaling, softcap or 1.0,
            *query.stride()[:3], key.stride(0) // unit, key.stride(1) // unit,
            0 if table is None else table.stride(0),
            KEY_TOKEN=key.stride(2), UNIT=unit, RUN=run, GROUP=group,
            COLUMNS=max(COLUMNS, triton.next_power_of_2(group)), RANK=rank, PADDED=padded, DTYPE=dtype,
            SOFTCAP=softcap is not None, BLOCK=block, STAGES=stages(block * padded * key.element_size()),
            PAGED=table is not None, num_warps=WARPS,
        )  # fmt: skip


def stages(tile: int) -> int:
    """Depth of the pipeline by a tile's bytes: 12 KB or more on their way per program, within 48 KB of buffers."""
    return 4 if tile <= 4096 else 3 if tile <= 16384 else 2
