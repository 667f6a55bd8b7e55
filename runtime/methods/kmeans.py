"""Cosine k-means of many sets at once: every (sequence, KV head) of a layer, in the same tensor operations.

A sequence's clusters do not depend on the rest of the batch: one that has converged is left alone while others go on.
On a GPU both halves of a pass are kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...artifacts import KvcalError
from ...kernels.cluster import assign, update


@dataclass(frozen=True)
class KMeans:
    """Clusters of B sequences and H heads; sequence b has `counts[b]` clusters per head, at most C."""

    labels: Tensor
    """[B, H, S] int64; meaningless at tokens beyond a sequence's length."""
    centroids: Tensor
    """[B, H, C, D] float32, of unit length."""
    iterations: list[int]
    """Of each sequence: passes over its tokens."""


def spherical_kmeans(
    points: Tensor,
    lengths: Sequence[int],
    counts: Sequence[int],
    *,
    start: Tensor | None = None,
    iterations: int = 20,
    tolerance: float = 0.005,
) -> KMeans:
    """Cluster the directions of points by cosine similarity.

    Args:
        points: [B, H, S, D], of which sequence b has the first `lengths[b]`.
        counts: clusters of each sequence, at most its length.
        start: [H, C0, D] centroids of an earlier clustering. k-means begins with those that attract most points and,
            as far as they are too few, with points at equal distances in the sequence. None: such points alone (the
            paper's are random).
        iterations: at most so many passes.
        tolerance: a sequence is done when a pass moves no larger share of its tokens.

    An empty cluster is seeded again with one of the tokens that are least like their centroids.

    Raises:
        KvcalError: NaN or infinity among the points.
    """
    device, (batch, heads, tokens, _) = points.device, points.shape
    valid = torch.arange(tokens, device=device) < torch.tensor(lengths, device=device).view(-1, 1, 1)
    largest = points.abs().amax(-1)
    if broken := int((~largest.isfinite() & valid).sum()):
        raise KvcalError(
            f"{broken} of {int(valid.sum()) * heads} keys hold NaN or infinity, which belong to no cluster: load the "
            "model in float32 or bfloat16"
        )
    unit = directions(points, largest)
    width = max(counts)
    clusters = torch.tensor(counts, dtype=torch.int32, device=device)
    cluster_mask = torch.arange(width, device=device) < clusters.view(-1, 1, 1)
    centroids = _begin(unit, valid, counts, start)
    labels = torch.full((batch, heads, tokens), -1, dtype=torch.int32, device=device)
    active = torch.ones(batch, dtype=torch.bool, device=device)
    passes = torch.zeros(batch, dtype=torch.int64, device=device)
    for _ in range(iterations):
        assigned, similarity = nearest(unit, centroids, valid, clusters)
        assigned = torch.where(active.view(-1, 1, 1), assigned, labels)
        moved = ((assigned != labels) & valid).sum((1, 2)) / valid.expand(-1, heads, -1).sum((1, 2)).clamp_min(1)
        labels = assigned
        passes += active
        updated = _update(unit, valid, labels, similarity, cluster_mask, centroids)
        centroids = torch.where(active.view(-1, 1, 1, 1), updated, centroids)
        active = active & (moved > tolerance)
        if not bool(active.any()):
            break
    labels = nearest(unit, centroids, valid, clusters)[0]
    return KMeans(labels.long(), centroids, passes.tolist())


def directions(points: Tensor, largest: Tensor | None = None) -> Tensor:
    """[..., D] float32 of unit length, also of points whose squares float32 does not hold; zero where a point is.

    Args:
        largest: [...] the largest magnitude of each point, where it is known.
    """
    points = points.float()
    largest = points.abs().amax(-1) if largest is None else largest.float()
    if bool(((largest == 0) | ((largest > 1e-12) & (largest < 1e12))).all()):
        return F.normalize(points, dim=-1)
    exponent = torch.frexp(largest.unsqueeze(-1)).exponent
    half = exponent // 2  # in two steps: 2^-exponent itself may be beyond float32
    return F.normalize(torch.ldexp(torch.ldexp(points, -half), half - exponent), dim=-1)


def nearest(unit: Tensor, centroids: Tensor, valid: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """([B, H, S] int32 most similar centroid, [B, H, S] how similar); -1 and 0 where a token is not `valid`.

    Args:
        valid: [B, 1, S] bool, the tokens of each sequence: its first ones.
        counts: [B] int32, how many centroids each sequence has; None: all C.
    """
    if counts is None:
        counts = torch.full(unit.shape[:1], centroids.shape[2], dtype=torch.int32, device=unit.device)
    return assign(unit, centroids, _lengths(valid), counts)


def sums_by_label(values: Tensor, labels: Tensor, valid: Tensor, count: int) -> Tensor:
    """[B, H, count, D] float32: `values` [B, H, S, D] added up by label, tokens that are not `valid` left out."""
    values = values.float() if values.dtype == torch.float64 else values
    return update(values, labels.int(), _lengths(valid), count)[0]


def _lengths(valid: Tensor) -> Tensor:
    return valid.sum((1, 2), dtype=torch.int32)


def _update(
    unit: Tensor, valid: Tensor, labels: Tensor, similarity: Tensor, cluster_mask: Tensor, centroids: Tensor
) -> Tensor:
    sums, sizes = update(unit, labels, _lengths(valid), centroids.shape[2])
    empty = (sizes == 0) & cluster_mask
    updated = torch.where(sizes.unsqueeze(-1) > 0, F.normalize(sums, dim=-1), centroids)
    vacant = int(empty.sum(-1).max())
    if vacant:
        worst = similarity.masked_fill(~valid, torch.inf).topk(min(vacant, unit.shape[2]), largest=False).indices
        turn = (empty.cumsum(-1) - 1).clamp(0, worst.shape[-1] - 1)
        token = worst.gather(-1, turn).unsqueeze(-1).expand(*turn.shape, unit.shape[3])
        updated = torch.where(empty.unsqueeze(-1), unit.gather(2, token), updated)
    return updated


def _begin(unit: Tensor, valid: Tensor, counts: Sequence[int], start: Tensor | None) -> Tensor:
    """[B, H, C, D] initial centroids: calibrated ones as far as there are any, then tokens at equal distances.

    k-means++ spreads them better and takes several times as long, and the error of attention is no smaller
    (docs/methods.md).
    """
    batch, heads, _, dims = unit.shape
    lengths = valid.sum(-1, keepdim=True)
    given = 0 if start is None else start.shape[1]
    turn = torch.arange(max(counts), device=unit.device) - given
    missing = (torch.tensor(counts, device=unit.device).view(-1, 1, 1) - given).clamp_min(1)
    token = ((2 * turn + 1) * lengths // (2 * missing)).clamp_min(0).minimum(lengths - 1).clamp_min(0)
    centroids = unit.gather(2, token.unsqueeze(-1).expand(batch, heads, -1, dims))
    if start is not None:
        calibrated = directions(start.to(unit.device)).expand(batch, -1, -1, -1)
        labels = nearest(unit, calibrated, valid)[0]
        attracted = update(unit[..., :1], labels, _lengths(valid), given)[1]
        # A stable sort: the order of centroids that attract equally many does not depend on the rest of the batch.
        chosen = attracted.sort(dim=-1, descending=True, stable=True).indices[..., : max(counts)]
        centroids[:, :, : chosen.shape[2]] = calibrated.gather(2, chosen.unsqueeze(-1).expand(-1, -1, -1, dims))
    return centroids
