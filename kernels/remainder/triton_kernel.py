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

WARPS, TOKENS = 4, 16
"""TOKENS: candidates of a cluster that are summed at once: as many as most clusters have."""
SMALLEST = 256
"""Clusters that a partial result should stand for."""
VARYING = [
    "heads", "clusters", "capacity", "splits", "bias_row", "bias_head", "value_row", "value_head",
    "value_scale_row", "value_scale_head", "value_scale_step",
]  # fmt: skip


@triton.jit
def over(rows, REPEAT: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS] again and again: [REPEAT · ROWS]."""
    return tl.reshape(tl.broadcast_to(rows[None, :], [REPEAT, ROWS]), [REPEAT * ROWS])


@triton.jit(do_not_specialize=VARYING)
def remainder_kernel(
    out, lse, scores, ends, candidates, value, value_scale, open_sum, open_count, left, cluster_scores,
    bias, correction,
    heads, clusters, capacity, splits, scaling,
    bias_row: tl.int64, bias_head: tl.int64, bias_stride: tl.int64, value_row: tl.int64, value_head: tl.int64,
    value_step: tl.int64, value_scale_row: tl.int64, value_scale_head: tl.int64, value_scale_step: tl.int64,
    SHARING: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, REPEAT: tl.constexpr, CLUSTERS: tl.constexpr,
    TOKENS: tl.constexpr, GROUP_TILE: tl.constexpr, DV: tl.constexpr, DV_TILE: tl.constexpr, COARSE: tl.constexpr,
    BIASED: tl.constexpr, CORRECTED: tl.constexpr, PRECISION: tl.constexpr,
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
    scores += query[:, None, None] * capacity.to(tl.int64)
    column, token = tl.arange(0, DV_TILE), tl.arange(0, TOKENS)
    best = tl.full([ROWS], NONE, tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([REPEAT * ROWS, DV_TILE], tl.float32)
    begin, end = even_part(clusters, part, splits, CLUSTERS)
    for first in range(begin, end, CLUSTERS):
        cluster = first + tl.arange(0, CLUSTERS)
        valid = cluster < end
        after = tl.load(ends + cluster, mask=valid, other=0)
        at = tl.load(ends + cluster - 1, mask=valid & (cluster > 0), other=0)
        filled = tl.where(valid, after - at, 0)
        there = filled > 0
        risen = best
        masses = tl.zeros([ROWS, CLUSTERS], tl.float32)
        if COARSE:
            number = tl.load(left + cluster, mask=valid, other=0.0)
            there = there | (number > 0)
            some_left = asked[:, None] & (number > 0)[None, :]
            of_mean = cluster_scores + query[:, None] * clusters + cluster[None, :]
            of_mean = tl.load(of_mean, mask=some_left, other=NONE)
            of_mean = of_mean.to(tl.float32) * LOG2E
            risen = tl.maximum(risen, tl.max(of_mean, 1))
            shift = tl.where(risen == NONE, 0.0, risen)
            masses = number[None, :] * tl.exp2(of_mean - shift[:, None])
        for step in range(0, tl.max(filled, 0), TOKENS):
            within = (step + token)[None, :] < filled[:, None]
            known = asked[:, None, None] & within[None, :, :]
            logits = tl.load(scores + ((at + step)[:, None] + token[None, :])[None, :, :], mask=known, other=NONE)
            logits = logits.to(tl.float32) * LOG2E
            higher = tl.maximum(risen, tl.max(tl.max(logits, 2), 1))
            shift = tl.where(higher == NONE, 0.0, higher)
            masses = masses * tl.exp2(risen - shift)[:, None] + tl.sum(tl.exp2(logits - shift[:, None, None]), 2)
            risen = higher
        shift = tl.where(risen == NONE, 0.0, risen)
        fade = tl.exp2(best - shift)
        mass = mass * fade + tl.sum(masses, 1)
        needed = there[:, None] & (column < DV)[None, :]
        values = tl.load(value + cluster[:, None] * value_step + column[None, :], mask=needed, other=0)
        scale = tl.load(value_scale + cluster * value_scale_step, mask=there, other=0.0).to(tl.float32)
        weights = tl.reshape(tl.broadcast_to(masses[None, :, :], [REPEAT, ROWS, CLUSTERS]), [REPEAT * ROWS, CLUSTERS])
        total = total * over(fade, REPEAT, ROWS)[:, None]
        total = tl.dot(weights, values.to(tl.float32) * scale[:, None], total, input_precision=PRECISION)
        best = risen

    if part == splits - 1:  # the open window, one more cluster
        window = tl.load(ends + clusters - 1)
        finish = tl.minimum(tl.load(candidates + row), capacity)
        opened = tl.zeros([ROWS], tl.float32)
        risen = best
        for step in range(window, finish, TOKENS):
            current = asked[:, None, None] & (step + token < finish)[None, None, :]
            recent = tl.load(scores + (step + token)[None, None, :], mask=current, other=NONE).to(tl.float32) * LOG2E
            higher = tl.maximum(risen, tl.max(tl.max(recent, 2), 1))
            shift = tl.where(higher == NONE, 0.0, higher)
            opened = opened * tl.exp2(risen - shift) + tl.sum(tl.sum(tl.exp2(recent - shift[:, None, None]), 2), 1)
            risen = higher
        fade = tl.exp2(best - tl.where(risen == NONE, 0.0, risen))
        mass = mass * fade + opened
        tokens = tl.maximum(tl.load(open_count + row), 1).to(tl.float32)
        mean = tl.load(open_sum + pair.to(tl.int64) * DV + column, mask=column < DV, other=0.0) / tokens
        total = total * over(fade, REPEAT, ROWS)[:, None] + over(opened, REPEAT, ROWS)[:, None] * mean[None, :]
        best = risen

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
    repeated = tl.arange(0, REPEAT * ROWS)
    inside = (repeated < QUERIES)[:, None] & (column < DV)[None, :]
    total = total / over(some, REPEAT, ROWS)[:, None]
    tl.store(out + (lines + repeated)[:, None] * DV + column[None, :], total, mask=inside)


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
            CLUSTERS=16, TOKENS=TOKENS,
            GROUP_TILE=triton.next_power_of_2(scores.shape[2]), DV=width,
            DV_TILE=max(16, triton.next_power_of_2(width)), COARSE=left is not None, BIASED=bias is not None,
            CORRECTED=correction is not None,
            # What float16 scores weigh needs no more digits than theirs.
            PRECISION="ieee" if scores.dtype == torch.float32 else "tf32", num_warps=WARPS,
        )  # fmt: skip
    return by_query(scores, (out, lse))
