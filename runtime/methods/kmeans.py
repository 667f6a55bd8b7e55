"""Cosine k-means of many sets at once: every (row, KV head) of a layer, in the same tensor operations.

A row's clusters do not depend on the rows beside it: one that has converged is left alone while others go on. On a GPU
both halves of a pass are kernels.
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
    """Clusters of B rows and H heads; row b has `counts[b]` of them, of at most C."""

    labels: Tensor
    """[B, H, S] int64; of tokens beyond a row's length meaningless."""
    centroids: Tensor
    """[B, H, C, D] float32, of unit length."""
    iterations: list[int]
    """Per row: passes over its tokens."""


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
        points: [B, H, S, D], of which row b has `lengths[b]`.
        counts: clusters per row, at most its length.
        start: [H, C0, D] centroids of an earlier clustering; those that attract most points are begun with, and what
            is missing are points at equal distances in their order. None: such points alone, as the paper's are random.
        iterations: at most so many passes.
        tolerance: a row is done when a pass moves no larger a share of its tokens.

    An empty cluster is seeded again with a token that is least like its centroid.

    Raises:
        KvcalError: NaN or infinity among the points.
    """
    device, (batch, heads, tokens, _) = points.device, points.shape
    held = torch.arange(tokens, device=device) < torch.tensor(lengths, device=device).view(-1, 1, 1)
    largest = points.abs().amax(-1)
    if broken := int((~largest.isfinite() & held).sum()):
        raise KvcalError(
            f"{broken} of {int(held.sum()) * heads} keys hold NaN or infinity, which belong to no cluster: load the "
            "model in float32 or bfloat16"
        )
    unit = directions(points, largest)
    most = max(counts)
    own = torch.tensor(counts, dtype=torch.int32, device=device)
    there = torch.arange(most, device=device) < own.view(-1, 1, 1)
    centroids = _begin(unit, held, counts, start)
    labels = torch.full((batch, heads, tokens), -1, dtype=torch.int32, device=device)
    active = torch.ones(batch, dtype=torch.bool, device=device)
    passes = torch.zeros(batch, dtype=torch.int64, device=device)
    for _ in range(iterations):
        found, similarity = nearest(unit, centroids, held, own)
        found = torch.where(active.view(-1, 1, 1), found, labels)
        moved = ((found != labels) & held).sum((1, 2)) / held.expand(-1, heads, -1).sum((1, 2)).clamp_min(1)
        labels = found
        passes += active
        updated = _update(unit, held, labels, similarity, there, centroids)
        centroids = torch.where(active.view(-1, 1, 1, 1), updated, centroids)
        active = active & (moved > tolerance)
        if not bool(active.any()):
            break
    labels = nearest(unit, centroids, held, own)[0]
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


def nearest(unit: Tensor, centroids: Tensor, held: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """([B, H, S] int32 most similar centroid, [B, H, S] how similar); -1 and 0 where a token is not `held`.

    Args:
        held: [B, 1, S] bool, the tokens of each row: its first ones.
        counts: [B] int32 centroids of each row; all of them by default.
    """
    if counts is None:
        counts = torch.full(unit.shape[:1], centroids.shape[2], dtype=torch.int32, device=unit.device)
    return assign(unit, centroids, _lengths(held), counts)


def sums_by_label(values: Tensor, labels: Tensor, held: Tensor, count: int) -> Tensor:
    """[B, H, count, D] float32: `values` [B, H, S, D] added up by label, tokens that are not `held` left out."""
    values = values.float() if values.dtype == torch.float64 else values
    return update(values, labels.int(), _lengths(held), count)[0]


def _lengths(held: Tensor) -> Tensor:
    return held.sum((1, 2), dtype=torch.int32)


def _update(unit: Tensor, held: Tensor, labels: Tensor, similarity: Tensor, there: Tensor, centroids: Tensor) -> Tensor:
    sums, sizes = update(unit, labels, _lengths(held), centroids.shape[2])
    empty = (sizes == 0) & there
    updated = torch.where(sizes.unsqueeze(-1) > 0, F.normalize(sums, dim=-1), centroids)
    vacant = int(empty.sum(-1).max())
    if vacant:
        worst = similarity.masked_fill(~held, torch.inf).topk(min(vacant, unit.shape[2]), largest=False).indices
        turn = (empty.cumsum(-1) - 1).clamp(0, worst.shape[-1] - 1)
        token = worst.gather(-1, turn).unsqueeze(-1).expand(*turn.shape, unit.shape[3])
        updated = torch.where(empty.unsqueeze(-1), unit.gather(2, token), updated)
    return updated


def _begin(unit: Tensor, held: Tensor, counts: Sequence[int], start: Tensor | None) -> Tensor:
    """[B, H, C, D]: calibrated centroids as far as there are any, then tokens at equal distances.

    k-means++ spreads them better and takes several times as long, and the error of attention is no smaller
    (docs/methods.md).
    """
    batch, heads, _, dims = unit.shape
    lengths = held.sum(-1, keepdim=True)
    given = 0 if start is None else start.shape[1]
    turn = torch.arange(max(counts), device=unit.device) - given
    missing = (torch.tensor(counts, device=unit.device).view(-1, 1, 1) - given).clamp_min(1)
    token = ((2 * turn + 1) * lengths // (2 * missing)).clamp_min(0).minimum(lengths - 1).clamp_min(0)
    centroids = unit.gather(2, token.unsqueeze(-1).expand(batch, heads, -1, dims))
    if start is not None:
        calibrated = directions(start.to(unit.device)).expand(batch, -1, -1, -1)
        labels = nearest(unit, calibrated, held)[0]
        attracted = update(unit[..., :1], labels, _lengths(held), given)[1]
        # A stable sort, so that centroids that attract as many come in an order that no other row has a say in.
        chosen = attracted.sort(dim=-1, descending=True, stable=True).indices[..., : max(counts)]
        centroids[:, :, : chosen.shape[2]] = calibrated.gather(2, chosen.unsqueeze(-1).expand(-1, -1, -1, dims))
    return centroids
