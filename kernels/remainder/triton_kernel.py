"""What was not read, cluster by cluster: sums of exponentials, then the product with the mean values. One launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attend.launch import by_query
from ..attend.plan import even_part
from ..attend.shapes import Partial, choose_splits
from ..attend.tile import LN2, LOG2E, NONE
from ..backend import device_of

WARPS = 4
CLUSTERS, TOKENS, WIDE = 16, 16, 256
"""Clusters of a tile, candidates of each that are summed at once, scores of which the largest is taken at once."""
SMALLEST = 256
"""Clusters that a partial result should stand for."""
VARYING = [
    "heads", "clusters", "capacity", "splits", "bias_row", "bias_head", "value_row", "value_head",
    "value_scale_row", "value_scale_head", "value_scale_step",
]  # fmt: skip


@triton.jit
def repeated(rows, REPEAT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] again and again: [REPEAT · ROWS, COLUMNS]."""
    return tl.reshape(tl.broadcast_to(rows[None, :, :], [REPEAT, ROWS, COLUMNS]), [REPEAT * ROWS, COLUMNS])


@triton.jit(do_not_specialize=VARYING)
def remainder_kernel(
    out, lse, scores, ends, candidates, value, value_scale, open_sum, open_count, left, cluster_scores,
    bias, correction,
    heads, clusters, capacity, splits, scaling,
    bias_row: tl.int64, bias_head: tl.int64, bias_stride: tl.int64, value_row: tl.int64, value_head: tl.int64,
    value_step: tl.int64, value_scale_row: tl.int64, value_scale_head: tl.int64, value_scale_step: tl.int64,
    SHARING: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, REPEAT: tl.constexpr, CLUSTERS: tl.constexpr,
    TOKENS: tl.constexpr, WIDE: tl.constexpr, GROUP_TILE: tl.constexpr, DV: tl.constexpr, DV_TILE: tl.constexpr,
    COARSE: tl.constexpr, BIASED: tl.constexpr, CORRECTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a part of the clusters of one group; SHARING groups are of one (row, KV head)."""
    slot = tl.program_id(0)
    part, group = slot % splits, slot // splits
    pair = group // SHARING
    row, head = pair // heads, pair % heads
    scores += group.to(tl.int64) * QUERIES * capacity
    cluster_scores += group.to(tl.int64) * QUERIES * clusters
    ends += group.to(tl.int64) * clusters
    left += group.to(tl.int64) * clusters
    value += row * value_row + head * value_head
    value_scale += row * value_scale_row + head * value_scale_head
    query = tl.arange(0, ROWS)
    asked = query < QUERIES
    column, token = tl.arange(0, DV_TILE), tl.arange(0, TOKENS)
    begin, end = even_part(clusters, part, splits, CLUSTERS)

    # The largest first: with it known, nothing is ever weighed anew.
    wide = tl.arange(0, WIDE)
    highest = tl.full([ROWS, WIDE], NONE, tl.float32)
    if COARSE:
        for first in range(begin, end, WIDE):
            cluster = first + wide
            some_left = tl.load(left + cluster, mask=cluster < end, other=0.0) > 0
            at = cluster_scores + query[:, None] * clusters + cluster[None, :]
            number = tl.load(at, mask=asked[:, None] & some_left[None, :], other=NONE)
            highest = tl.maximum(highest, number.to(tl.float32))
    start = tl.load(ends + begin - 1, mask=(begin > 0) & (begin < end), other=0)
    stop = tl.load(ends + end - 1, mask=begin < end, other=0)
    if part == splits - 1:  # the open window too
        start = tl.where(begin < end, start, tl.load(ends + clusters - 1))
        stop = tl.minimum(tl.load(candidates + row), capacity)
    for first in range(start, stop, WIDE):
        candidate = first + wide
        at = scores + query[:, None] * capacity.to(tl.int64) + candidate[None, :]
        number = tl.load(at, mask=asked[:, None] & (candidate < stop)[None, :], other=NONE)
        highest = tl.maximum(highest, number.to(tl.float32))
    best = tl.max(highest, 1) * LOG2E
    shift = tl.where(best == NONE, 0.0, best)

    total = tl.zeros([REPEAT * ROWS, DV_TILE], tl.float32)
    all_masses = tl.zeros([ROWS, CLUSTERS], tl.float32)
    of_query = scores + query[:, None, None] * capacity.to(tl.int64)
    for first in range(begin, end, CLUSTERS):
        cluster = first + tl.arange(0, CLUSTERS)
        valid = cluster < end
        after = tl.load(ends + cluster, mask=valid, other=0)
        before = tl.load(ends + cluster - 1, mask=valid & (cluster > 0), other=0)
        filled = tl.where(valid, after - before, 0)
        there = filled > 0
        sums = tl.zeros([ROWS, CLUSTERS, TOKENS], tl.float32)
        for step in range(0, tl.max(filled, 0), TOKENS):
            known = asked[:, None, None] & ((step + token)[None, :] < filled[:, None])[None, :, :]
            logits = tl.load(of_query + ((before + step)[:, None] + token[None, :])[None, :, :], mask=known, other=NONE)
            sums += tl.exp2(logits.to(tl.float32) * LOG2E - shift[:, None, None])
        masses = tl.sum(sums, 2)
        if COARSE:
            unrefined = tl.load(left + cluster, mask=valid, other=0.0)
            there = there | (unrefined > 0)
            of_mean = cluster_scores + query[:, None] * clusters + cluster[None, :]
            of_mean = tl.load(of_mean, mask=asked[:, None] & (unrefined > 0)[None, :], other=NONE)
            masses += unrefined[None, :] * tl.exp2(of_mean.to(tl.float32) * LOG2E - shift[:, None])
        all_masses += masses
        needed = there[:, None] & (column < DV)[None, :]
        values = tl.load(value + cluster[:, None] * value_step + column[None, :], mask=needed, other=0).to(tl.float32)
        scale = tl.load(value_scale + cluster * value_scale_step, mask=there, other=0.0).to(tl.float32)
        weights = repeated(masses * scale[None, :], REPEAT, ROWS, CLUSTERS)
        total = tl.dot(weights, values, total, input_precision=PRECISION)
    mass = tl.sum(all_masses, 1)

    if part == splits - 1:
        sums = tl.zeros([ROWS, 1, TOKENS], tl.float32)
        for step in range(tl.load(ends + clusters - 1), stop, TOKENS):
            current = asked[:, None, None] & (step + token < stop)[None, None, :]
            logits = tl.load(of_query + (step + token)[None, None, :], mask=current, other=NONE)
            sums += tl.exp2(logits.to(tl.float32) * LOG2E - shift[:, None, None])
        opened = tl.sum(sums, 2)
        mass += tl.sum(opened, 1)
        tokens = tl.maximum(tl.load(open_count + row), 1).to(tl.float32)
        mean = tl.load(open_sum + pair.to(tl.int64) * DV + column, mask=column < DV, other=0.0) / tokens
        total += repeated(opened, REPEAT, ROWS, 1) * mean[None, :]

    some = tl.where(mass == 0, 1.0, mass)
    natural = (best + tl.log2(some)) * LN2
    if BIASED:
        of_group = tl.arange(0, GROUP_TILE)
        each = tl.load(
            bias + row * bias_row + head * bias_head + of_group * bias_stride,
            mask=of_group < SHARING * QUERIES, other=NONE,
        )  # fmt: skip
        natural += scaling * tl.max(each, 0)
    if CORRECTED:
        natural += tl.load(correction + head)
    lines = slot.to(tl.int64) * QUERIES
    tl.store(lse + lines + query, tl.where(mass == 0, NONE, natural), mask=asked)
    line = tl.arange(0, REPEAT * ROWS)
    total = total / repeated(some[:, None], REPEAT, ROWS, 1)
    inside = (line < QUERIES)[:, None] & (column < DV)[None, :]
    tl.store(out + (lines + line)[:, None] * DV + column[None, :], total, mask=inside)


def remainder(
    scores: Tensor,
    ends: Tensor,
    candidates: Tensor,
    value: Tensor,
    value_scale: Tensor,
    open_sum: Tensor,
    open_count: Tensor,
    left: Tensor | None,
    cluster_scores: Tensor | None,
    bias: Tensor | None,
    correction: Tensor | None,
    scaling: float,
    splits: int | None,
) -> Partial:
    groups, clusters, width = ends.shape[:-1].numel(), ends.shape[-1], value.shape[-1]
    pairs = value.shape[0] * value.shape[1]
    queries = scores.shape[:3].numel() // groups
    splits = splits or choose_splits(groups, clusters, SMALLEST, scores.device)
    shape = (groups, splits, queries)
    out = torch.empty(*shape, width, dtype=torch.float32, device=scores.device)
    lse = torch.empty(shape, dtype=torch.float32, device=scores.device)
    rows = triton.next_power_of_2(queries)
    with device_of(scores):
        remainder_kernel[(groups * splits,)](
            out, lse, scores, ends, candidates, value, value_scale, open_sum, open_count,
            ends if left is None else left, scores if cluster_scores is None else cluster_scores, bias, correction,
            value.shape[1], clusters, scores.shape[-1], splits, scaling,
            *((0, 0, 0) if bias is None else bias.stride()), *value.stride()[:3], *value_scale.stride(),
            SHARING=groups // pairs, QUERIES=queries, ROWS=rows, REPEAT=max(1, 16 // rows),
            CLUSTERS=CLUSTERS, TOKENS=TOKENS, WIDE=WIDE,
            GROUP_TILE=triton.next_power_of_2(scores.shape[2]), DV=width,
            DV_TILE=max(16, triton.next_power_of_2(width)), COARSE=left is not None, BIASED=bias is not None,
            CORRECTED=correction is not None,
            # What float16 scores weigh needs no more digits than theirs.
            PRECISION="ieee" if scores.dtype == torch.float32 else "tf32", num_warps=WARPS,
        )  # fmt: skip
    return by_query(scores, (out, lse))
