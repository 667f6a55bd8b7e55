"""What calibrated centroids save at inference: k-means iterations until the clustering is as good as it gets.

The calibrated centroids come from other text of the same model. Lloyd's algorithm (scikit-learn's) then runs on the
new keys from there, from k-means++ (Arthur and Vassilvitskii 2007) and from random keys. Counted are the iterations
until the inertia is within a tolerance of the least that any of the three reaches: the last iterations before
convergence move a handful of keys and change nothing that decoding would notice. The seeding's own cost, several
iterations' worth for k-means++, is not counted.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .clustering import check_metric, cluster_keys, finite, one_thread, power_of_two, to_metric_space

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class WarmStart:
    """One layer's comparison. Fewer iterations at a higher inertia is no saving: read the two together."""

    clusters: int
    """Clusters in all three runs: what was asked for, or the number of new keys where those are fewer."""
    max_iterations: int
    """Iterations of every run; a count that equals it may mean that the tolerance was never met."""
    calibrated_iterations: Tensor
    """[Hkv] int64, from the calibrated centroids: iterations until the inertia is within the tolerance of the best."""
    plusplus_iterations: Tensor
    """[Hkv] int64, from k-means++ on the new keys."""
    random_iterations: Tensor
    """[Hkv] int64, from new keys drawn at random: what an inference without an artifact does."""
    calibrated_inertia: Tensor
    """[Hkv] float64, sum of squared distances of the new keys to their centroids after all iterations."""
    plusplus_inertia: Tensor
    """[Hkv] float64, the same from k-means++."""
    random_inertia: Tensor
    """[Hkv] float64, the same from random keys."""


def warm_start(
    fit_keys: Tensor,
    new_keys: Tensor,
    *,
    clusters: int,
    metric: str = "cosine",
    seed: int = 0,
    max_iterations: int = 20,
    tolerance: float = 0.01,
    where: str = "",
) -> WarmStart:
    """Clusters fit_keys [Hkv, N1, D] as the calibration does, then compares starting points on new_keys [Hkv, N2, D].

    Under "cosine" the keys are normalised first and the iterations are Lloyd's on the sphere's chords, whose
    centroids may leave the sphere; all three starts are treated alike. One seed per head: judge the average over
    heads and layers. `max_iterations` is ClusterKV's. Raises KvcalError where `cluster_keys` does (`where` goes
    into the text).
    """
    import numpy as np

    check_metric(metric)
    fit_keys, new_keys = finite(fit_keys, "keys", where), finite(new_keys, "new keys", where)
    if (fit_keys.shape[0], fit_keys.shape[2]) != (new_keys.shape[0], new_keys.shape[2]):
        raise ValueError(f"fit_keys {tuple(fit_keys.shape)} and new_keys {tuple(new_keys.shape)} must share Hkv and D")
    clusters = min(clusters, new_keys.shape[1])
    fitted = cluster_keys(fit_keys, fit_keys, clusters=clusters, metric=metric, seed=seed, where=where)
    points = to_metric_space(new_keys, metric, where)
    iterations, final = [], []
    with one_thread():  # scikit-learn adds its threads' partial sums in the order in which they finish
        for raw, centroids in zip(points, fitted.centroids, strict=True):
            scale = power_of_two(torch.cat((raw, centroids)))  # squares are then no larger than float32 holds
            head = (raw / scale).numpy()
            starts = ((centroids / scale).numpy(), *_uncalibrated_starts(head, clusters, seed))
            inertia = np.array([_inertia_by_iteration(head, start, max_iterations) for start in starts])
            reached = inertia <= (1 + tolerance) * inertia[:, -1].min()
            iterations.append(np.where(reached.any(1), reached.argmax(1) + 1, max_iterations))
            final.append(inertia[:, -1] * scale**2)
    columns = [torch.tensor(np.stack(rows)[:, start]) for rows in (iterations, final) for start in range(3)]
    return WarmStart(clusters, max_iterations, *columns)


def _uncalibrated_starts(points: np.ndarray, clusters: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    import numpy as np
    from sklearn.cluster import kmeans_plusplus

    plusplus, _ = kmeans_plusplus(points, clusters, random_state=seed)
    return plusplus, points[np.random.default_rng(seed).choice(len(points), clusters, replace=False)]


def _inertia_by_iteration(points: np.ndarray, centroids: np.ndarray, iterations: int) -> list[float]:
    """Inertia after each of Lloyd's iterations on points [N, D] from centroids [C, D]."""
    from sklearn.cluster import KMeans

    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one iteration at a time never converges
        for _ in range(iterations):
            step = KMeans(len(centroids), init=centroids, n_init=1, max_iter=1, algorithm="lloyd").fit(points)
            centroids = step.cluster_centers_
            found.append(float(step.inertia_))
    return found
