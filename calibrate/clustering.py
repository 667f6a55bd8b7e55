"""k-means of the sampled keys of a layer, one clustering per KV head: the centroids that decoding starts from.

The Lloyd iterations are faiss' (Johnson, Douze, Jégou 2017), the seeding is scikit-learn's k-means++ (Arthur and
Vassilvitskii 2007); cosine k-means is the spherical one (Dhillon and Modha 2001), which ClusterKV uses online.
`cluster_keys` runs on one thread: BLAS and OpenMP may add in another order when the number of threads changes, and
the same inputs have to give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..artifacts.errors import KvcalError
from ..artifacts.packages import require

METRICS = ("cosine", "l2")
SILHOUETTE_SAMPLE = 1000
ASSIGN_ROWS = 8192  # keys compared with all centroids at once: bounds the memory to ASSIGN_ROWS * C doubles


@dataclass(frozen=True)
class KeyClusters:
    """One layer's clusterings, clusters by descending size. Distances are in the metric's space: the length of the
    chord on the unit sphere for "cosine", L2 between raw keys for "l2"."""

    centroids: Tensor
    """[Hkv, C, D] float32; unit length when the metric is "cosine"."""
    sizes: Tensor
    """[Hkv, C] int64, sum over C = number of keys; 0 only where a head has fewer distinct keys than clusters."""
    radius_mean: Tensor
    """[Hkv, C] float32, mean distance of the cluster's keys to its centroid; 0 for an empty cluster."""
    radius_p95: Tensor
    """[Hkv, C] float32, 95th percentile of those distances, linearly interpolated."""
    radius_max: Tensor
    """[Hkv, C] float32, largest of those distances."""
    value_mean: Tensor
    """[Hkv, C, Dv] float32, mean value of the cluster's tokens; 0 for an empty cluster."""
    inertia: Tensor
    """[Hkv] float64, sum (as scikit-learn's, not mean) over all keys of the squared distance to their centroid."""
    silhouette: Tensor
    """[Hkv] float64 in [-1, 1] on at most 1000 keys, the same positions for all heads; NaN where it is undefined
    (the sampled keys fall into one cluster, or each into its own)."""


def cluster_keys(
    keys: Tensor,
    values: Tensor,
    *,
    clusters: int,
    metric: str = "cosine",
    iterations: int = 20,
    seed: int = 0,
    where: str = "",
) -> KeyClusters:
    """Clusters one layer's keys [Hkv, N, D] with their values [Hkv, N, Dv]; any device and dtype, results on the CPU.

    `where` ("layer 3") goes into the errors. Raises KvcalError when the keys cannot be clustered (fewer keys than
    clusters or no clusters, NaN or infinity, a zero key under "cosine"), ValueError for an unknown metric or a shape
    that does not fit.
    """
    check_metric(metric)
    keys, values = finite(keys, "keys", where), finite(values, "values", where)
    if keys.shape[:2] != values.shape[:2]:
        raise ValueError(f"keys {tuple(keys.shape)} and values {tuple(values.shape)} must share [Hkv, N]")
    if clusters < 1 or iterations < 1:
        raise KvcalError(f"{clusters} clusters in {iterations} iterations{_at(where)}: ask for at least 1 of each")
    if keys.shape[1] < clusters:
        raise KvcalError(
            f"{keys.shape[1]} keys cannot make {clusters} clusters{_at(where)}: "
            f"ask for at most {keys.shape[1]} clusters, or calibrate on more tokens"
        )
    points = to_metric_space(keys, metric, where)
    with one_thread():
        heads = [_cluster_head(p, v, clusters, metric, iterations, seed) for p, v in zip(points, values, strict=True)]
    return KeyClusters(*(torch.stack(parts) for parts in zip(*heads, strict=True)))


def assign(keys: Tensor, centroids: Tensor, metric: str) -> Tensor:
    """The nearest centroid of each key: keys [N, D], centroids [C, D] -> labels [N] int64. Under "cosine" nearest
    means smallest angle, and neither side needs unit length. Equal distances go to the lower label."""
    check_metric(metric)
    return _nearest(to_metric_space(keys, metric), to_metric_space(centroids, metric))


def to_metric_space(keys: Tensor, metric: str, where: str = "") -> Tensor:
    """keys [..., D] -> [..., D] float32 whose L2 distances are the metric's: unit length for "cosine", unchanged for
    "l2". Raises KvcalError for a zero key under "cosine", which has no direction, and for keys so large under "l2" that
    float32 does not hold their distances."""
    if metric == "l2":
        measurable(keys, where)
        return keys.float()
    norms = keys.double().norm(dim=-1, keepdim=True)
    if (norms == 0).any():
        raise KvcalError(
            f"{int((norms == 0).sum())} keys are zero and have no direction{_at(where)}: "
            'leave padding out of the sample, or use the metric "l2"'
        )
    return (keys.double() / norms).float()


def measurable(keys: Tensor, where: str = "") -> None:
    """Raises KvcalError when float32 does not hold the distances between keys [..., D]."""
    largest = float(keys.abs().max())
    if largest * 2 * keys.shape[-1] ** 0.5 > torch.finfo(torch.float32).max:
        raise KvcalError(
            f"numbers as large as {largest:.1e}{_at(where)}, too large for float32 to hold the distances between keys: "
            "check the weights of this layer"
        )


def power_of_two(points: Tensor) -> float:
    """The power of two next above the largest magnitude in points, 1 where all are zero. Dividing by it is exact, and
    makes squares that float32 holds, where those of 1e20 are infinite and those of 1e-30 zero."""
    largest = float(points.abs().max())
    return 2.0 ** math.frexp(largest)[1] if largest else 1.0


def check_metric(metric: str) -> None:
    """Raises ValueError for a metric that is not in METRICS."""
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}: known are {', '.join(METRICS)}")


def finite(tensor: Tensor, name: str, where: str = "") -> Tensor:
    """tensor [Hkv, N, D] as contiguous float32 on the CPU. Raises KvcalError when it holds NaN or infinity."""
    if tensor.ndim != 3 or 0 in tensor.shape:
        raise ValueError(f"{name} must be a non-empty [Hkv, N, D], got {tuple(tensor.shape)}")
    tensor = tensor.detach().to("cpu", torch.float32).contiguous()
    broken = ~tensor.isfinite().all(dim=-1)
    if broken.any():
        head = int(broken.any(dim=-1).nonzero()[0])
        raise KvcalError(
            f"{int(broken.sum())} of {broken.numel()} {name} hold NaN or infinity, the first in KV head {head}"
            f"{_at(where)}: calibrate the model in float32 or bfloat16"
        )
    return tensor


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch, faiss, BLAS and scikit-learn inside the block; the former numbers return afterwards."""
    require("faiss", "sklearn", "threadpoolctl", to="cluster keys")
    import faiss  # noqa: F401  (only libraries that are already loaded are limited)
    import sklearn.cluster  # noqa: F401
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # scikit-learn depends on it

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with threadpool_limits(limits=1):
            yield
    finally:
        torch.set_num_threads(before)


def _cluster_head(
    points: Tensor, values: Tensor, clusters: int, metric: str, iterations: int, seed: int
) -> tuple[Tensor, ...]:
    """points [N, D] in the metric's space, values [N, Dv] -> the fields of KeyClusters for one head, in order."""
    centroids, labels = kmeans(points, clusters, metric, iterations, seed)
    sizes = torch.bincount(labels, minlength=clusters)
    squared = squared_distances(points, centroids, labels)
    value_sum = torch.zeros(clusters, values.shape[1], dtype=torch.float64).index_add_(0, labels, values.double())
    return (
        centroids,
        sizes,
        *(radius.float() for radius in radii(squared.sqrt(), labels, sizes)),
        (value_sum / sizes.clamp(min=1)[:, None]).float(),
        squared.sum(),
        torch.tensor(_silhouette(points, labels, seed), dtype=torch.float64),
    )


def kmeans(points: Tensor, clusters: int, metric: str, iterations: int, seed: int) -> tuple[Tensor, Tensor]:
    """points [N, D] float32 in the metric's space, finite, N at least `clusters` -> centroids [C, D] float32 in
    descending order of size, labels [N] of the nearest. Within `one_thread`, the same on every run."""
    centroids, labels = _refill(points, _lloyd(points, clusters, metric, iterations, seed), metric)
    by_size = torch.bincount(labels, minlength=clusters).argsort(descending=True, stable=True)
    return centroids[by_size], by_size.argsort()[labels]


def _lloyd(points: Tensor, clusters: int, metric: str, iterations: int, seed: int) -> Tensor:
    """points [N, D] in the metric's space -> centroids [C, D] float32. No randomness is left to faiss: it gets its
    starting points and sees all keys, and splits empty clusters with a constant seed of its own."""
    import faiss
    from sklearn.cluster import kmeans_plusplus

    # faiss expands |x - c|^2 in float32, which loses the distances between keys that are far from the origin (biased
    # projections make such keys). L2 k-means does not depend on the origin, so it is moved to the mean.
    shift = points.double().mean(0) if metric == "l2" else torch.zeros(points.shape[1], dtype=torch.float64)
    centred = points.double() - shift
    scale = power_of_two(centred)  # faiss ends the process when a square is infinite
    data = (centred / scale).float().numpy()
    start, _ = kmeans_plusplus(data, clusters, random_state=seed)
    kmeans = faiss.Kmeans(
        points.shape[1],
        clusters,
        niter=iterations,
        spherical=metric == "cosine",
        gpu=min(1, faiss.get_num_gpus()),
        min_points_per_centroid=1,
        max_points_per_centroid=len(data),
    )
    kmeans.train(data, init_centroids=start)
    return (torch.from_numpy(kmeans.centroids).double() * scale + shift).float()


def _refill(points: Tensor, centroids: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Moves each centroid that no key is nearest to onto one of the keys that are farthest from theirs, as
    scikit-learn does -> centroids [C, D], labels [N]. Under "cosine" it also restores unit length, which keys that
    cancel out take away. Each pass gives one more key a centroid of its own, until all clusters are occupied or all
    keys sit on a centroid; "on" means nearer than float32 can tell, or rounding could keep the loop from ending."""
    rounding = 1e-12 * points.double().square().sum(-1).max()
    if metric == "cosine":
        norms = centroids.double().norm(dim=-1, keepdim=True)
        lost = (norms < 1e-3).squeeze(-1)
        centroids = torch.where(lost[:, None], points[0], (centroids.double() / norms.clamp(min=1e-3)).float())
    while True:
        labels = _nearest(points, centroids)
        squared = squared_distances(points, centroids, labels)
        empty = (torch.bincount(labels, minlength=len(centroids)) == 0).nonzero().squeeze(-1)
        empty = empty[: int((squared > rounding).sum())]
        if not len(empty):
            return centroids, labels
        farthest = squared.argsort(descending=True, stable=True)[: len(empty)]
        centroids = centroids.index_copy(0, empty, points[farthest])


def _nearest(points: Tensor, centroids: Tensor) -> Tensor:
    """points [N, D], centroids [C, D] -> [N] int64. In float64: |x|^2 can exceed the distances by a factor of 1e5."""
    centroids = centroids.double()
    half = centroids.square().sum(-1) / 2
    return torch.cat([(half - rows.double() @ centroids.T).argmin(-1) for rows in points.split(ASSIGN_ROWS)])


def squared_distances(points: Tensor, centroids: Tensor, labels: Tensor) -> Tensor:
    """Squared L2 distance of each point [N, D] to the centroid [C, D] of its label [N] -> [N] float64."""
    return (points.double() - centroids.double()[labels]).square().sum(-1)


def radii(distance: Tensor, labels: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, 95th percentile and maximum of distance [N] within each label, each [C]. sizes [C] descends."""
    order = distance.argsort(stable=True)
    order = order[labels[order].argsort(stable=True)]  # by label, then by distance: clusters are ascending segments
    ascending = torch.cat([distance[order], distance.new_zeros(1)])  # empty clusters come last and read the zero
    first = sizes.cumsum(0) - sizes
    last = (sizes - 1).clamp(min=0)
    rank = 0.95 * last.double()
    p95 = torch.lerp(ascending[first + rank.floor().long()], ascending[first + rank.ceil().long()], rank.frac())
    mean = torch.zeros(len(sizes), dtype=torch.float64).index_add_(0, labels, distance) / sizes.clamp(min=1)
    return mean, p95, ascending[first + last]


def _silhouette(points: Tensor, labels: Tensor, seed: int) -> float:
    """scikit-learn's mean silhouette (Rousseeuw 1987) of a seeded sample of points [N, D] with labels [N]."""
    from sklearn.metrics import silhouette_score

    generator = torch.Generator().manual_seed(seed)
    sample = torch.randperm(len(points), generator=generator)[:SILHOUETTE_SAMPLE]
    points, labels = points[sample], labels[sample]
    if not 2 <= len(labels.unique()) <= len(labels) - 1:
        return float("nan")
    return float(silhouette_score((points / power_of_two(points)).numpy(), labels.numpy(), metric="euclidean"))


def _at(where: str) -> str:
    return f" ({where})" if where else ""
