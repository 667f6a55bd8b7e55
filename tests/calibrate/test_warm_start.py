"""Iterations saved by calibrated centroids, against Lloyd's algorithm written out in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from torch import Tensor

from kvcal.artifacts.errors import KvcalError
from kvcal.calibrate.clustering import METRICS, cluster_keys
from kvcal.calibrate.warm_start import warm_start


def blobs(count: int, per_blob: int, dim: int, seed: int) -> tuple[Tensor, np.ndarray]:
    """Two heads of separated groups [2, N, dim]; the groups are the same for every seed, their members are not."""
    centers = 10 * np.linalg.qr(np.random.default_rng(99).standard_normal((dim, dim)))[0][:count]
    rng = np.random.default_rng(seed)
    truth = rng.permutation(np.repeat(np.arange(count), per_blob))
    points = centers[truth] + 0.5 * rng.standard_normal((2, len(truth), dim))
    return torch.tensor(points, dtype=torch.float32), truth


def unit(points: np.ndarray) -> np.ndarray:
    return points / np.linalg.norm(points, axis=-1, keepdims=True)


def lloyd(points: np.ndarray, centers: np.ndarray, iterations: int) -> list[float]:
    """The inertia after each iteration."""
    inertia = []
    for _ in range(iterations):
        labels = cdist(points, centers).argmin(1)
        centers = np.stack([points[labels == cluster].mean(0) for cluster in range(len(centers))])
        inertia.append(float((cdist(points, centers).min(1) ** 2).sum()))
    return inertia


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("tolerance", [0.0, 0.01, 0.05])
def test_iterations_and_inertia_from_calibrated_centroids(metric, tolerance):
    generator = torch.Generator().manual_seed(4)
    fit, new = torch.randn(2, 300, 3, generator=generator), torch.randn(2, 300, 3, generator=generator)
    found = warm_start(fit, new, clusters=6, metric=metric, tolerance=tolerance, max_iterations=15)
    start = cluster_keys(fit, fit, clusters=6, metric=metric).centroids.double().numpy()
    points = new.double().numpy() if metric == "l2" else unit(new.double().numpy())
    for head in range(2):
        expected = lloyd(points[head], start[head], 15)
        assert found.calibrated_inertia[head].item() == pytest.approx(expected[-1], rel=1e-5)
        finals = (found.calibrated_inertia, found.plusplus_inertia, found.random_inertia)
        target = (1 + tolerance) * min(final[head].item() for final in finals)
        reached = [iteration + 1 for iteration, inertia in enumerate(expected) if inertia <= target * (1 + 1e-6)]
        assert found.calibrated_iterations[head].item() == (reached[0] if reached else 15)


def test_same_groups_need_no_search_and_lose_nothing():
    fit, _ = blobs(16, 12, 16, seed=0)
    new, truth = blobs(16, 12, 16, seed=1)
    found = warm_start(fit, new, clusters=16, metric="l2")
    points = new.double().numpy()
    within = [sum(((head[truth == g] - head[truth == g].mean(0)) ** 2).sum() for g in range(16)) for head in points]
    assert found.clusters == 16
    assert found.calibrated_iterations.tolist() == [1, 1]
    assert found.calibrated_inertia.tolist() == pytest.approx(within, rel=1e-4)
    # Random keys start with two in one group nearly always (16! / 16^16 otherwise), and Lloyd cannot repair that.
    assert bool((found.random_inertia > 1.5 * found.calibrated_inertia).all())
    assert bool((found.plusplus_inertia < found.random_inertia).all())
    assert found.random_iterations.tolist() == [found.max_iterations] * 2


def test_foreign_centroids_are_seen_to_be_worse():
    """The measure is not rigged: centroids fitted on keys elsewhere must cost iterations or inertia."""
    new, _ = blobs(16, 12, 16, seed=1)
    native = warm_start(blobs(16, 12, 16, seed=0)[0], new, clusters=16, metric="l2")
    foreign = warm_start(torch.randn(2, 100, 16) + 100, new, clusters=16, metric="l2")
    assert bool((foreign.calibrated_inertia > 1.5 * native.calibrated_inertia).all())
    assert torch.equal(foreign.random_inertia, native.random_inertia)


def test_fewer_new_keys_than_clusters():
    found = warm_start(torch.randn(1, 50, 4), torch.randn(1, 5, 4), clusters=20, metric="l2")
    assert found.clusters == 5
    for inertia in (found.calibrated_inertia, found.plusplus_inertia, found.random_inertia):
        assert inertia.shape == (1,) and inertia.dtype == torch.float64
    assert found.plusplus_inertia.item() == pytest.approx(0, abs=1e-6)  # k-means++ never takes a key twice


def test_cut_off_and_types():
    keys = torch.randn(3, 120, 4)
    found = warm_start(keys, torch.randn(3, 120, 4), clusters=12, max_iterations=1)
    assert found.max_iterations == 1
    for count in (found.calibrated_iterations, found.plusplus_iterations, found.random_iterations):
        assert count.tolist() == [1, 1, 1] and count.dtype == torch.int64


@pytest.mark.parametrize("factor", [2.0**66, 2.0**-100])
def test_keys_whose_squares_float32_does_not_hold(factor):
    keys, new = torch.randn(1, 60, 4), torch.randn(1, 60, 4)
    found = warm_start(keys * factor, new * factor, clusters=5, metric="l2")
    plain = warm_start(keys, new, clusters=5, metric="l2")
    for start in ("calibrated", "plusplus", "random"):
        assert torch.equal(getattr(found, f"{start}_iterations"), getattr(plain, f"{start}_iterations"))
        torch.testing.assert_close(getattr(found, f"{start}_inertia"), getattr(plain, f"{start}_inertia") * factor**2)


def test_bad_input():
    good = torch.randn(2, 10, 4)
    with pytest.raises(KvcalError, match=r"10 keys cannot make 11 clusters \(layer 2\)"):
        warm_start(good, torch.randn(2, 30, 4), clusters=11, where="layer 2")
    with pytest.raises(KvcalError, match=r"new keys hold NaN.*\(layer 2\)"):
        warm_start(good, good * float("nan"), clusters=2, where="layer 2")
    with pytest.raises(ValueError, match="must share Hkv and D"):
        warm_start(good, torch.randn(2, 10, 5), clusters=2)
    with pytest.raises(ValueError, match="known are cosine, l2"):
        warm_start(good, good, clusters=2, metric="dot")
