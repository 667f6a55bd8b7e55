"""What calibrated centroids save at inference: k-means iterations until convergence, from three starting points.

The calibrated centroids come from other text of the same model. Lloyd's algorithm (scikit-learn's) then runs on the
new keys from there, from k-means++ (Arthur and Vassilvitskii 2007) and from random keys, until it stops by itself.
The seeding's own cost, several iterations' worth for scikit-learn's greedy k-means++, is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .clustering import check_metric, cluster_keys, finite, one_thread, to_metric_space


@dataclass(frozen=True)
class WarmStart:
    """One layer's comparison. Fewer iterations at a higher inertia is no saving: read the two together."""

    clusters: int
    """Clusters in all three runs: what was asked for, or the number of new keys where those are fewer."""
    max_iterations: int
    """Where a run was cut off: an iteration count that equals it did not converge."""
    calibrated_iterations: Tensor
    """[Hkv] int64, Lloyd iterations from the calibrated centroids until convergence."""
    plusplus_iterations: Tensor
    """[Hkv] int64, from k-means++ on the new keys."""
    random_iterations: Tensor
    """[Hkv] int64, from new keys drawn at random: what an inference without an artifact does."""
    calibrated_inertia: Tensor
    """[Hkv] float64, final sum of squared distances of the new keys to their centroids, from the calibrated ones."""
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
    max_iterations: int = 100,
    tolerance: float = 1e-4,
    where: str = "",
) -> WarmStart:
    """Clusters fit_keys [Hkv, N1, D] as the calibration does, then compares starting points on new_keys [Hkv, N2, D].

    A run has converged when its centroids' squared movements sum to at most `tolerance` times the mean variance of a
    key's coordinates (scikit-learn's `tol`), or when no label changes. Under "cosine" the keys are normalised first
    and the iterations are Lloyd's on the sphere's chords, whose centroids may leave the sphere; all three starts are
    treated alike. One seed per head: judge the average over heads and layers. Raises KvcalError where `cluster_keys`
    does (`where` goes into the text).
    """
    check_metric(metric)
    fit_keys, new_keys = finite(fit_keys, "keys", where), finite(new_keys, "new keys", where)
    if (fit_keys.shape[0], fit_keys.shape[2]) != (new_keys.shape[0], new_keys.shape[2]):
        raise ValueError(f"fit_keys {tuple(fit_keys.shape)} and new_keys {tuple(new_keys.shape)} must share Hkv and D")
    clusters = min(clusters, new_keys.shape[1])
    fitted = cluster_keys(fit_keys, fit_keys, clusters=clusters, metric=metric, seed=seed, where=where)
    points = to_metric_space(new_keys, metric, where).numpy()
    with one_thread():  # scikit-learn adds its threads' partial sums in the order in which they finish
        runs = [
            [
                _lloyd(head, init, clusters, seed, max_iterations, tolerance)
                for init in (calibrated, "k-means++", "random")
            ]
            for head, calibrated in zip(points, fitted.centroids.numpy(), strict=True)
        ]
    iterations = torch.tensor([[count for count, _ in head] for head in runs])
    inertia = torch.tensor([[final for _, final in head] for head in runs], dtype=torch.float64)
    columns = [column.clone() for column in (*iterations.T, *inertia.T)]  # no shared storage
    return WarmStart(clusters, max_iterations, *columns)


def _lloyd(
    points: np.ndarray, init: np.ndarray | str, clusters: int, seed: int, max_iterations: int, tolerance: float
) -> tuple[int, float]:
    """k-means of points [N, D] from init ([C, D] or scikit-learn's name for it) -> iterations, final inertia."""
    from sklearn.cluster import KMeans

    kmeans = KMeans(
        clusters, init=init, n_init=1, max_iter=max_iterations, tol=tolerance, random_state=seed, algorithm="lloyd"
    ).fit(points)
    return int(kmeans.n_iter_), float(kmeans.inertia_)
