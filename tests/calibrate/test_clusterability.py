"""Greedy k-center, against optimal covers by brute force and a traversal written out with scipy."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from torch import Tensor

from kvcal.artifacts.errors import KvcalError
from kvcal.calibrate.clusterability import clusterability

points_2d = st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=1, max_size=9)


def keys_of(points: list[tuple[int, int]]) -> Tensor:
    return torch.tensor([points], dtype=torch.float32)


def traversal(points: np.ndarray, centers: int) -> list[float]:
    """Farthest-first by the book: the cover radius after each center."""
    distances = cdist(points, points)
    chosen = [int(cdist(points, points.mean(0)[None]).argmin())]
    radii = []
    for _ in range(centers):
        nearest = distances[:, chosen].min(1)
        radii.append(nearest.max())
        chosen.append(int(nearest.argmax()))
    return radii


@pytest.mark.parametrize("count,limit,counts", [(63, 1024, [1, 2, 4, 8, 16, 32, 63]), (100, 10, [1, 2, 4, 8, 10])])
def test_radii_are_those_of_the_traversal(count, limit, counts):
    keys = torch.randn(3, count, 12, generator=torch.Generator().manual_seed(count)) + 5
    found = clusterability(keys, keys, limit)
    assert found.counts.tolist() == counts and found.counts.dtype == torch.int64
    expected = [[traversal(head, max(counts))[c - 1] for c in counts] for head in keys.double().numpy()]
    np.testing.assert_allclose(found.radius.numpy(), expected, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(points_2d)
def test_at_most_twice_the_optimal_radius(points):
    found = clusterability(keys_of(points), keys_of(points))
    distances = cdist(points, points)
    for clusters, radius in zip(found.counts.tolist(), found.radius[0].tolist(), strict=True):
        optimal = min(distances[:, chosen].min(1).max() for chosen in combinations(range(len(points)), clusters))
        assert optimal - 1e-4 <= radius <= 2 * optimal + 1e-4


@settings(max_examples=40, deadline=None)
@given(points_2d, st.randoms(use_true_random=False))
def test_online_clustering_opens_no_more_than_counted(points, random):
    found = clusterability(keys_of(points), keys_of(points))
    random.shuffle(points)
    for clusters, radius in zip(found.counts.tolist(), found.radius[0].tolist(), strict=True):
        opened: list[tuple[int, int]] = []
        for point in points:
            if not opened or cdist([point], opened).min() > 2 * radius + 1e-5:
                opened.append(point)
        assert len(opened) <= clusters


@settings(max_examples=40, deadline=None)
@given(points_2d)
def test_curve_falls_to_zero(points):
    found = clusterability(keys_of(points), keys_of(points))
    assert bool((found.radius.diff(dim=-1) <= 0).all())
    assert found.counts[-1].item() == len(points) and found.radius[0, -1].item() == 0.0


def test_repeated_keys_need_one_cluster_per_distinct_key():
    keys = (torch.randn(1, 4, 8) + 1000).repeat(1, 25, 1)
    found = clusterability(keys, keys, limit=8)
    assert (found.radius[0] > 0).tolist() == [True, True, False, False]  # at 1, 2, 4, 8


def test_tight_groups_show_as_a_drop():
    generator = torch.Generator().manual_seed(0)
    centers = 50 * torch.eye(8)
    keys = (centers.repeat(10, 1) + 0.1 * torch.randn(80, 8, generator=generator))[None]
    found = clusterability(keys, keys)
    radius = dict(zip(found.counts.tolist(), found.radius[0].tolist(), strict=True))
    assert radius[4] > 60 and radius[8] < 2


def test_norms_and_exponent():
    generator = torch.Generator().manual_seed(1)
    keys, queries = torch.randn(2, 40, 6, generator=generator), 3 * torch.randn(2, 333, 6, generator=generator)
    found = clusterability(keys, queries)
    norms = np.linalg.norm(queries.double().numpy(), axis=-1)
    np.testing.assert_allclose(found.query_norm_max.numpy(), norms.max(1), rtol=1e-5)
    np.testing.assert_allclose(found.query_norm_p99.numpy(), np.percentile(norms, 99, axis=1), rtol=1e-5)
    # One center, the key nearest the mean: the exponent bounds the logit of every pair and is scaled once.
    for head in range(2):
        points = keys[head].double().numpy()
        center = points[cdist(points, points.mean(0)[None]).argmin()]
        logits = 0.25 * queries[head].double().numpy() @ (points - center).T
        exponent = found.delta_r(0.25)[head, 0].item()
        assert np.abs(logits).max() <= exponent
        assert exponent == pytest.approx(0.25 * norms[head].max() * np.linalg.norm(points - center, axis=1).max())
    assert found.delta_r(0.25).shape == (2, len(found.counts))


def test_heads_do_not_touch_one_another():
    keys = torch.randn(3, 50, 4)
    together = clusterability(keys, keys)
    for head in range(3):
        alone = clusterability(keys[head : head + 1], keys[head : head + 1])
        assert torch.equal(alone.radius[0], together.radius[head])


def test_half_precision_input_is_left_alone():
    keys = torch.randn(1, 20, 4).bfloat16()
    before = keys.clone()
    assert clusterability(keys, keys).radius.dtype == torch.float32
    assert torch.equal(keys, before)


@pytest.mark.parametrize("factor", [2.0**66, 2.0**-100])
def test_norms_whose_squares_float32_does_not_hold(factor):
    keys, queries = torch.randn(2, 30, 4), torch.randn(2, 30, 4)
    found, plain = clusterability(keys * factor, queries * factor), clusterability(keys, queries)
    assert torch.equal(found.radius, plain.radius * factor)
    assert torch.equal(found.query_norm_max, plain.query_norm_max * factor)
    assert torch.equal(found.query_norm_p99, plain.query_norm_p99 * factor)
    torch.testing.assert_close(found.delta_r(0.5), plain.delta_r(0.5) * factor**2)
    with pytest.raises(KvcalError, match=r"large as 3\.0e\+38 \(layer 7\), too large"):
        clusterability(keys, torch.full((2, 30, 4), 3e38), where="layer 7")


def test_bad_input():
    good, bad = torch.randn(2, 10, 4), torch.full((2, 10, 4), float("nan"))
    with pytest.raises(KvcalError, match=r"20 of 20 keys hold NaN.*\(layer 7\)"):
        clusterability(bad, good, where="layer 7")
    with pytest.raises(KvcalError, match="queries hold NaN"):
        clusterability(good, bad)
    with pytest.raises(ValueError, match="must share Hkv and D"):
        clusterability(good, torch.randn(1, 10, 4))
    with pytest.raises(ValueError, match="limit must be at least 1"):
        clusterability(good, good, limit=0)
