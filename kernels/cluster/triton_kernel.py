"""`assign` never stores all similarities; `update` adds in the order of the tokens, without atomics (README.md)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import device_of, interpreting

NONE = tl.constexpr(float("-inf"))
LARGEST = 256.0
"""What float32 is multiplied by before it becomes two float16 numbers: their sum then has 22 bits from 2^-10 to 1."""
TOKENS, KEYS = 128, 32768
CLUSTERS, CENTRES = 32, 4096
"""Of `assign`, at most: keys of a program and centroids of a tile, and the numbers in either."""
NARROWEST = 16
"""The fewest centroids of a tile."""
ASSIGN_WARPS = 8
SCAN, RUN = 1024, 4
"""Of `update`: labels read at a time, and how many neighbouring ones by one thread."""
GROUP = 4
"""Of `update`: clusters of a program."""
ROWS, SUM = 128, 2048
"""Of `update`, at most: tokens added at a time, and the numbers in them."""
UPDATE_WARPS = 4
VARYING = ["clusters", "sequence_stride", "head_stride"]
"""Arguments that change, as the number of tokens does, and must not compile a kernel again."""


@triton.jit(do_not_specialize=["tokens", *VARYING])
def assign_kernel(
    keys, high, low, lengths, counts, labels, similarities, tokens, clusters,
    sequence_stride: tl.int64, head_stride: tl.int64,
    TOKEN_STRIDE: tl.constexpr, UNIT: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, SPLIT: tl.constexpr,
    DTYPE: tl.constexpr, LARGEST: tl.constexpr, TOKENS: tl.constexpr, CLUSTERS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * TOKENS
    head, sequence = tl.program_id(1), tl.program_id(2)
    pair = (sequence * tl.num_programs(1) + head).to(tl.int64)
    length = tl.minimum(tl.load(lengths + sequence), tokens)
    token = first + tl.arange(0, TOKENS)
    labels += pair * tokens
    similarities += pair * tokens

    if first >= length:
        tl.store(labels + token, tl.full([TOKENS], -1, tl.int32), mask=token < tokens)
        tl.store(similarities + token, tl.zeros([TOKENS], tl.float32), mask=token < tokens)
    else:
        dim = tl.arange(0, PADDED)
        held = (token < length)[:, None] & (dim < WIDTH)[None, :]
        keys += (sequence * sequence_stride + head * head_stride) * UNIT
        key = tl.load(keys + token[:, None] * TOKEN_STRIDE + dim[None, :], mask=held, other=0.0)
        if SPLIT:
            key *= LARGEST
            key_high = key.to(tl.float16)
            key_low = (key - key_high.to(tl.float32)).to(tl.float16)
        else:
            key_high = key.to(DTYPE)

        count = tl.minimum(tl.load(counts + sequence), clusters)
        column = tl.arange(0, CLUSTERS)
        high += pair * clusters * WIDTH
        low += pair * clusters * WIDTH
        # One best of each column of the tiles, an earlier tile's before a later one's; columns meet at the end.
        best = tl.full([TOKENS, CLUSTERS], NONE, tl.float32)
        nearest = tl.zeros([TOKENS, CLUSTERS], tl.int32)
        for block in tl.range(0, tl.cdiv(count, CLUSTERS), num_stages=STAGES):
            cluster = block * CLUSTERS + column
            inside = (cluster < count)[:, None] & (dim < WIDTH)[None, :]
            offset = cluster.to(tl.int64)[:, None] * WIDTH + dim[None, :]
            centre_high = tl.trans(tl.load(high + offset, mask=inside, other=0.0)).to(DTYPE)
            similarity = tl.dot(key_high, centre_high, input_precision="ieee")
            if SPLIT:
                centre_low = tl.trans(tl.load(low + offset, mask=inside, other=0.0))
                similarity = tl.dot(key_high, centre_low, acc=similarity)
                similarity = tl.dot(key_low, centre_high, acc=similarity)
            better = (similarity > best) & (cluster < count)[None, :]
            best = tl.where(better, similarity, best)
            nearest = tl.where(better, cluster[None, :], nearest)

        highest = tl.max(best, 1)
        lowest = tl.min(tl.where(best == highest[:, None], nearest, clusters), 1)
        if SPLIT:
            highest *= 1.0 / (LARGEST * LARGEST)
        present = token < length
        tl.store(labels + token, tl.where(present, lowest, -1), mask=token < tokens)
        tl.store(similarities + token, tl.where(present, highest, 0.0), mask=token < tokens)


@triton.jit
def labels_at(labels, block, length, RUN: tl.constexpr, UNIT: tl.constexpr, SCAN: tl.constexpr):
    """([SCAN / RUN, RUN] labels, -1 beyond the length, and their tokens); a run belongs to one thread."""
    token = block * SCAN + tl.arange(0, SCAN // RUN)[:, None] * RUN + tl.arange(0, RUN)[None, :]
    # Rounded up, within the sequence's labels: a mask that all labels of a 16-byte load share.
    label = tl.load(labels + token, mask=token < tl.cdiv(length, UNIT) * UNIT, other=-1)
    return tl.where(token < length, label, -1), token


@triton.jit(do_not_specialize=["units", *VARYING])
def update_kernel(
    values, labels, lengths, members, sums, sizes, units, clusters, sequence_stride: tl.int64, head_stride: tl.int64,
    TOKEN_STRIDE: tl.constexpr, UNIT: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    RUN: tl.constexpr, LABELS: tl.constexpr, SCAN: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    first, head, sequence = tl.program_id(0) * GROUP, tl.program_id(1), tl.program_id(2)
    pair = (sequence * tl.num_programs(1) + head).to(tl.int64)
    length = tl.minimum(tl.load(lengths + sequence), units * LABELS)
    last = tl.minimum(first + GROUP, clusters)
    labels += pair * units * LABELS

    lower = tl.zeros([SCAN // RUN, RUN], tl.int32)
    for block in range(0, tl.cdiv(length, SCAN)):
        label, _ = labels_at(labels, block, length, RUN, LABELS, SCAN)
        lower += ((label >= 0) & (label < first)).to(tl.int32)
    # The members of lower groups stand before this one's.
    members += pair * units * LABELS + tl.sum(tl.sum(lower, 1), 0)

    listed = 0
    for block in range(0, tl.cdiv(length, SCAN)):
        label, token = labels_at(labels, block, length, RUN, LABELS, SCAN)
        mine = ((label >= first) & (label < last)).to(tl.int32)
        of_run = tl.sum(mine, 1)
        rank = (tl.cumsum(of_run, 0) - of_run)[:, None] + tl.cumsum(mine, 1) - 1
        tl.store(members + listed + rank, token * GROUP + label - first, mask=mine > 0)
        listed += tl.sum(of_run, 0)
    tl.debug_barrier()  # every thread sees what the others wrote down

    cluster = tl.arange(0, GROUP)
    dim = tl.arange(0, PADDED)
    values += (sequence * sequence_stride + head * head_stride) * UNIT
    total = tl.zeros([GROUP, ROWS, PADDED], tl.float32)
    size = tl.zeros([GROUP, ROWS], tl.int32)
    for block in range(0, tl.cdiv(listed, ROWS)):
        rank = block * ROWS + tl.arange(0, ROWS)
        member = tl.load(members + rank, mask=rank < listed, other=-1)
        token = (member // GROUP)[None, :, None]
        inside = (member >= 0)[None, :, None] & (dim < WIDTH)[None, None, :]
        value = tl.load(values + token * TOKEN_STRIDE + dim[None, None, :], mask=inside, other=0.0).to(tl.float32)
        mine = (member >= 0)[None, :] & (member[None, :] % GROUP == cluster[:, None])
        total += tl.where(mine[:, :, None], value, 0.0)
        size += mine.to(tl.int32)
    valid = first + cluster < clusters
    written = pair * clusters + first + cluster
    inside = valid[:, None] & (dim < WIDTH)[None, :]
    tl.store(sums + written[:, None] * WIDTH + dim[None, :], tl.sum(total, 1), mask=inside)
    tl.store(sizes + written, tl.sum(size, 1), mask=valid)


def assign(unit: Tensor, centroids: Tensor, lengths: Tensor, counts: Tensor, label: Tensor, similarity: Tensor) -> None:
    """Writes `label` and `similarity`, already checked; see `kvcal.kernels.cluster.assign`."""
    batch, heads, tokens, width = unit.shape
    clusters = centroids.shape[2]
    padded = max(16, triton.next_power_of_2(width))
    split = unit.dtype == torch.float32
    high = low = centroids.contiguous()
    dtype = tl.float32 if interpreting() else getattr(tl, str(unit.dtype).removeprefix("torch."))
    if split:
        scaled = centroids * LARGEST
        high = scaled.to(torch.float16, memory_format=torch.contiguous_format)
        low = (scaled - high).to(torch.float16, memory_format=torch.contiguous_format)
        dtype = tl.float16
    program = min(TOKENS, KEYS // padded)
    with device_of(unit):
        assign_kernel[(triton.cdiv(tokens, program), heads, batch)](
            unit, high, low, lengths, counts, label, similarity, tokens, clusters, *strides(unit),
            WIDTH=width, PADDED=padded, SPLIT=split, DTYPE=dtype, LARGEST=LARGEST,
            TOKENS=program, CLUSTERS=max(NARROWEST, min(CLUSTERS, CENTRES // padded)), STAGES=2 if split else 3,
            num_warps=ASSIGN_WARPS,
        )  # fmt: skip


def update(values: Tensor, labels: Tensor, lengths: Tensor, sums: Tensor, sizes: Tensor) -> None:
    """Writes `sums` and `sizes`, already checked; see `kvcal.kernels.cluster.update`."""
    batch, heads, tokens, width = values.shape
    clusters = sums.shape[2]
    padded = triton.next_power_of_2(width)
    members = torch.empty_like(labels)
    aligned = RUN if tokens % RUN == 0 else 1
    with device_of(values):
        update_kernel[(triton.cdiv(clusters, GROUP), heads, batch)](
            values, labels, lengths, members, sums, sizes, tokens // aligned, clusters, *strides(values),
            WIDTH=width, PADDED=padded, RUN=RUN, LABELS=aligned, SCAN=SCAN,
            GROUP=GROUP, ROWS=min(ROWS, max(1, SUM // padded)), num_warps=UPDATE_WARPS,
        )  # fmt: skip


def strides(tokens: Tensor) -> tuple[int, int, int, int]:
    """(stride of a sequence and of a head, both in units; stride of a token; the unit).

    The unit is 16 bytes where both strides are multiples, so that the compiler knows every key to be aligned.
    """
    if tokens.shape[2] * tokens.stride(2) >= 2**31:
        raise ValueError(
            f"keys: received {tokens.shape[2]} tokens of stride {tokens.stride(2)}, expected a product below 2^31"
        )
    unit = 16 // tokens.element_size()
    unit = 1 if tokens.stride(0) % unit or tokens.stride(1) % unit else unit
    return tokens.stride(0) // unit, tokens.stride(1) // unit, tokens.stride(2), unit
