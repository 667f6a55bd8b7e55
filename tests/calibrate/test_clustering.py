"""k-means of the keys, against scikit-learn, scipy and definitions written out."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from kvcal.artifacts.errors import KvcalError
from kvcal.calibrate.clustering import METRICS, _refill, assign, cluster_keys


def blobs(count: int, per_blob: int, dim: int, metric: str, seed: int = 0) -> tuple[Tensor, np.ndarray]:
    """Separated groups of keys [1, count * per_blob, dim] in random order, and the group of each. Under "cosine" the
    groups are directions, and lengths vary so much that L2 would mix them up."""
    rng = np.random.default_rng(seed)
    truth = rng.permutation(np.repeat(np.arange(count), per_blob))
    centers = np.linalg.qr(rng.standard_normal((dim, dim)))[0][:count] * 10
    points = centers[truth] + rng.standard_normal((len(truth), dim)) * 0.5
    if metric == "cosine":
        points *= np.exp(rng.normal(0, 2, (len(truth), 1)))
    return torch.tensor(points[None], dtype=torch.float32), truth


def in_metric_space(keys: Tensor, metric: str) -> np.ndarray:
    points = keys.double().numpy()
    return points / np.linalg.norm(points, axis=-1, keepdims=True) if metric == "cosine" else points


@pytest.mark.parametrize("metric", METRICS)
def test_separated_groups_are_found_as_by_sklearn(metric):
    keys, truth = blobs(12, 15, 16, metric)
    found = cluster_keys(keys, keys, clusters=12, metric=metric)
    oracle = KMeans(12, n_init=5, random_state=0).fit(in_metric_space(keys[0], metric))
    labels = assign(keys[0], found.centroids[0], metric)
    assert adjusted_rand_score(truth, labels) == 1.0
    assert adjusted_rand_score(oracle.labels_, labels) == 1.0
    assert found.inertia[0].item() == pytest.approx(oracle.inertia_, rel=0.02)
    assert found.sizes[0].tolist() == [15] * 12


@pytest.mark.parametrize("offset", [0.0, 3000.0], ids=["centred", "far-from-origin"])
def test_inertia_without_separation_is_close_to_sklearn(offset):
    """Far away, as keys with a large bias are, faiss' own float32 expansion of |x - c|^2 would cost 3 % here."""
    keys = torch.randn(1, 1000, 128, generator=torch.Generator().manual_seed(1)) + offset
    found = cluster_keys(keys, keys, clusters=10, metric="l2")
    oracle = KMeans(10, n_init=3, random_state=0).fit(keys[0].double().numpy())
    assert found.inertia[0].item() == pytest.approx(oracle.inertia_, rel=0.015)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("heads,count,dim,clusters", [(1, 7, 3, 1), (3, 63, 16, 9), (2, 100, 5, 100), (2, 300, 8, 7)])
def test_description_matches_brute_force(metric, heads, count, dim, clusters):
    generator = torch.Generator().manual_seed(count)
    keys = torch.randn(heads, count, dim, generator=generator) + 2
    values = torch.randn(heads, count, 6, generator=generator)
    found = cluster_keys(keys, values, clusters=clusters, metric=metric)
    assert found.centroids.shape == (heads, clusters, dim) and found.centroids.dtype == torch.float32
    if metric == "cosine":
        torch.testing.assert_close(found.centroids.norm(dim=-1), torch.ones(heads, clusters))
    assert bool((found.sizes.diff(dim=-1) <= 0).all()) and found.sizes.dtype == torch.int64
    for head in range(heads):
        distances = cdist(in_metric_space(keys[head], metric), found.centroids[head].double().numpy())
        labels, nearest = distances.argmin(1), distances.min(1)
        assert assign(keys[head], found.centroids[head], metric).tolist() == labels.tolist()
        assert found.inertia[head].item() == pytest.approx((nearest**2).sum(), rel=1e-6, abs=1e-9)
        for cluster in range(clusters):
            mine = labels == cluster
            assert found.sizes[head, cluster].item() == mine.sum() > 0
            expected = nearest[mine].mean(), np.percentile(nearest[mine], 95), nearest[mine].max()
            actual = found.radius_mean, found.radius_p95, found.radius_max
            assert [a[head, cluster].item() for a in actual] == pytest.approx(expected, rel=1e-5, abs=1e-6)
            mean = torch.from_numpy(values[head].numpy()[mine].mean(0))
            torch.testing.assert_close(found.value_mean[head, cluster], mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_centroids_are_a_fixed_point_when_converged(metric):
    """Without separation, so that only the metric's own k-means has it: the spherical one for "cosine"."""
    keys = torch.randn(1, 150, 3, generator=torch.Generator().manual_seed(2)) + 0.5
    found = cluster_keys(keys, keys, clusters=4, metric=metric, iterations=100)
    points, labels = in_metric_space(keys[0], metric), assign(keys[0], found.centroids[0], metric).numpy()
    means = np.stack([points[labels == cluster].mean(0) for cluster in range(4)])
    if metric == "cosine":
        means /= np.linalg.norm(means, axis=-1, keepdims=True)
    np.testing.assert_allclose(found.centroids[0].numpy(), means, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_silhouette_is_its_definition(metric):
    keys = torch.randn(2, 40, 4, generator=torch.Generator().manual_seed(3))
    found = cluster_keys(keys, keys, clusters=5, metric=metric)
    for head in range(2):
        points = in_metric_space(keys[head], metric)
        distances, labels = cdist(points, points), assign(keys[head], found.centroids[head], metric).numpy()
        scores = []
        for i in range(40):
            means = {
                c: distances[i, labels == c].sum() / max(1, (labels == c).sum() - (c == labels[i])) for c in range(5)
            }
            own, other = means.pop(labels[i]), min(means.values())
            scores.append((other - own) / max(own, other) if (labels == labels[i]).sum() > 1 else 0.0)
        assert found.silhouette[head].item() == pytest.approx(np.mean(scores), abs=1e-4)


def test_silhouette_sample_stands_for_all_keys():
    keys, _ = blobs(3, 700, 4, "l2")
    found = cluster_keys(keys, keys, clusters=3, metric="l2", iterations=5)
    assert found.silhouette[0].item() > 0.85  # 0.5 * sqrt(2 * 4) between members, 10 * sqrt(2) between groups
    assert cluster_keys(keys[:, :9], keys[:, :9], clusters=1, metric="l2").silhouette.isnan().all()


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(*[st.integers(-2, 2)] * 3), min_size=1, max_size=30),
    st.integers(1, 12),
    st.sampled_from(METRICS),
)
def test_repeated_keys(points, clusters, metric):
    """Few distinct keys, as in repetitive text: no cluster is empty that could hold a key, nothing is lost."""
    if metric == "cosine":
        points = [point for point in points if any(point)] or [(1, 0, 0)]
    clusters = min(clusters, len(points))
    keys = torch.tensor([points], dtype=torch.float32)
    found = cluster_keys(keys, keys, clusters=clusters, metric=metric, iterations=4)
    assert found.sizes.sum().item() == len(points)
    assert found.centroids.isfinite().all() and found.radius_p95.isfinite().all()
    directions = {tuple(np.round(point, 6)) for point in in_metric_space(keys[0], metric)}
    assert (found.sizes > 0).sum().item() == min(clusters, len(directions))
    if clusters >= len(directions):
        assert found.inertia.item() == pytest.approx(0, abs=1e-9)


def test_opposite_keys_still_have_a_unit_centroid():
    keys = torch.tensor([[[3.0, 4.0], [-3.0, -4.0]]])
    found = cluster_keys(keys, keys, clusters=1)
    assert found.centroids.norm(dim=-1).item() == pytest.approx(1.0)
    assert found.sizes.tolist() == [[2]]


@pytest.mark.parametrize("metric", METRICS)
def test_empty_cluster_moves_to_the_farthest_key(metric):
    """faiss' last step may leave a cluster without keys; two centroids in one place force the case."""
    keys = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [1.0, 0.0]])
    centroids, labels = _refill(keys, torch.tensor([[1.0, 0.0]] * 3), metric)
    assert centroids.tolist() == [[1.0, 0.0], keys[2].tolist(), keys[1].tolist()]
    assert labels.tolist() == [0, 2, 1, 0]


def test_cosine_ignores_length():
    keys = torch.randn(1, 80, 8, generator=torch.Generator().manual_seed(5))
    scale = 2.0 ** torch.randint(-6, 7, (1, 80, 1), generator=torch.Generator().manual_seed(6))
    values = torch.randn(1, 80, 3)
    one, other = (cluster_keys(k, values, clusters=6) for k in (keys, keys * scale))
    assert torch.equal(one.centroids, other.centroids) and torch.equal(one.value_mean, other.value_mean)


def test_assign_takes_centroids_of_any_length():
    keys = torch.tensor([[1.0, 0.1], [0.1, 1.0], [5.0, 6.0]])
    centroids = torch.tensor([[100.0, 0.0], [0.0, 0.01]])
    assert assign(keys, centroids, "cosine").tolist() == [0, 1, 1]
    assert assign(keys, centroids, "l2").tolist() == [1, 1, 1]


def test_input_is_left_alone_and_may_be_half_precision():
    keys = torch.randn(2, 30, 4).bfloat16().requires_grad_()
    before, threads = keys.detach().clone(), torch.get_num_threads()
    found = cluster_keys(keys, keys, clusters=3)
    assert torch.equal(keys, before) and torch.get_num_threads() == threads
    assert not found.centroids.requires_grad and found.value_mean.dtype == torch.float32


def test_faiss_says_nothing(capfd):
    keys = torch.randn(1, 50, 4)
    cluster_keys(keys, keys, clusters=20)  # 2.5 points per centroid: faiss warns below 39
    assert capfd.readouterr() == ("", "")


PROGRAM = """
import hashlib, torch
from kvcal.calibrate.clustering import cluster_keys
keys = torch.randn(2, 700, 32, generator=torch.Generator().manual_seed(0)) + 1
digest = hashlib.sha256()
for metric in ("cosine", "l2"):
    found = cluster_keys(keys, keys, clusters=30, metric=metric, seed=3)
    for name in sorted(vars(found)):
        digest.update(getattr(found, name).numpy().tobytes())
print(digest.hexdigest(), torch.get_num_threads())
"""


def test_two_processes_agree_to_the_byte_whatever_their_threads():
    """This one and another."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(PROGRAM, {})
    one, threads = out.getvalue().split()
    wanted = "2" if threads == "1" else "1"
    other = {**os.environ, "OMP_NUM_THREADS": wanted, "PYTHONHASHSEED": wanted}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=other, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [one, wanted]


def test_seed_matters():
    keys = torch.randn(1, 200, 8, generator=torch.Generator().manual_seed(8))
    one, two = (cluster_keys(keys, keys, clusters=20, iterations=2, seed=seed) for seed in (0, 1))
    assert not torch.equal(one.centroids, two.centroids)


def poisoned(value: float) -> Tensor:
    keys = torch.ones(2, 10, 4)
    keys[1, 3, 2] = value
    return keys


@pytest.mark.parametrize(
    "keys,options,error,text",
    [
        (torch.randn(2, 40, 4), {"clusters": 50}, KvcalError, r"40 keys cannot make 50 clusters \(layer 3\): ask for"),
        (poisoned(float("nan")), {"clusters": 2}, KvcalError, r"1 of 20 keys hold NaN.*KV head 1 \(layer 3\): "),
        (poisoned(float("inf")), {"clusters": 2, "metric": "l2"}, KvcalError, "NaN or infinity"),
        (poisoned(3e38), {"clusters": 2, "metric": "l2"}, KvcalError, r"large as 3\.0e\+38 \(layer 3\), too large"),
        (torch.zeros(1, 5, 4), {"clusters": 2}, KvcalError, r"5 keys are zero.*\(layer 3\)"),
        (torch.randn(2, 40, 4), {"clusters": 2, "metric": "dot"}, ValueError, "'dot': known are cosine, l2"),
        (torch.randn(2, 40, 4), {"clusters": 0}, KvcalError, r"0 clusters.*\(layer 3\): ask for at least 1"),
        (torch.randn(2, 40, 4), {"clusters": 2, "iterations": 0}, KvcalError, "0 iterations"),
        (torch.randn(40, 4), {"clusters": 2}, ValueError, r"non-empty \[Hkv, N, D\]"),
        (torch.randn(2, 0, 4), {"clusters": 2}, ValueError, "non-empty"),
    ],
    ids=["few", "nan", "inf", "large", "zero", "metric", "clusters", "iterations", "shape", "empty"],
)
def test_bad_input(keys, options, error, text):
    with pytest.raises(error, match=text) as caught:
        cluster_keys(keys, keys, where="layer 3", **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("factor", [2.0**66, 2.0**-100, 2.0**120])
def test_keys_whose_squares_float32_does_not_hold(factor):
    """faiss ended the process on 1e20. Powers of two change no digit of anything."""
    keys, values = torch.randn(2, 60, 4) + 1, torch.randn(2, 60, 3)
    found = cluster_keys(keys * factor, values, clusters=5, metric="l2")
    plain = cluster_keys(keys, values, clusters=5, metric="l2")
    for name in ("centroids", "radius_mean", "radius_p95", "radius_max"):
        assert torch.equal(getattr(found, name), getattr(plain, name) * factor), name
    for name in ("sizes", "value_mean", "silhouette"):
        assert torch.equal(getattr(found, name), getattr(plain, name)), name
    torch.testing.assert_close(found.inertia, plain.inertia * factor**2)


@pytest.mark.parametrize("metric", METRICS)
def test_keys_far_larger_than_the_others(metric):
    keys = torch.randn(1, 20, 4)
    keys[0, 7] = 1e30
    found = cluster_keys(keys, keys, clusters=3, metric=metric)
    assert found.sizes.sum() == 20 and found.radius_max.isfinite().all()
    if metric == "l2":
        assert found.sizes[0, :2].tolist() == [19, 1] and found.centroids[0, 1].tolist() == pytest.approx([1e30] * 4)


def test_bad_companions():
    with pytest.raises(KvcalError, match="of 20 values hold NaN"):
        cluster_keys(torch.randn(2, 10, 4), poisoned(float("nan")), clusters=2)
    with pytest.raises(ValueError, match="must share"):
        cluster_keys(torch.randn(2, 10, 4), torch.randn(2, 9, 4), clusters=2)
    with pytest.raises(ValueError, match="known are"):
        assign(torch.randn(3, 4), torch.randn(2, 4), "euclid")
