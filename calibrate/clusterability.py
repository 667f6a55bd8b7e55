"""SubGen's assumption, measured: how many balls of which radius cover the keys of a head, and how long its queries are.

SubGen (Zandieh, Han, Mirrokni, Karbasi 2024) is sublinear where few clusters of a small radius delta cover the keys
and delta times the largest query norm r stays small. Greedy k-center (Gonzalez 1985) tells the radius that any number
of clusters needs, within a factor of 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .clustering import finite, measurable, one_thread, power_of_two

LIMIT = 1024
"""Centers at most."""


@dataclass(frozen=True)
class Clusterability:
    """One layer's cover radii against the number of clusters. Norms and distances are L2, on raw keys and queries."""

    counts: Tensor
    """[P] int64, ascending: 1, 2, 4, … and at last min(N, limit), be it a power of two or not."""
    radius: Tensor
    """[Hkv, P] float32, non-increasing along P: max distance of a key to the nearest of the first `counts` greedy
    centers, so a delta for which `counts` clusters suffice. At most twice the smallest such delta. An online
    clustering that opens a cluster for a key farther than 2 * radius[h, p] from the first keys of all others opens at
    most counts[p] of them on these keys."""
    query_norm_max: Tensor
    """[Hkv] float32, SubGen's r: the largest norm of the queries of the group."""
    query_norm_p99: Tensor
    """[Hkv] float32, the 99th percentile of those norms, linearly interpolated: r without the rare outliers."""

    def delta_r(self, scaling: float) -> Tensor:
        """[Hkv, P] float64: radius * query_norm_max * scaling, with the softmax scale (1/sqrt(D) as a rule).

        By Cauchy-Schwarz the logit of a key and that of its center, for any of these queries, differ by at most
        this: |q·k - q·c| * scaling <= |q| |k - c| * scaling. Two keys of one cluster are at most 2 delta apart, hence
        their softmax weights differ at most by the factor e^{2 delta r}. This is the factor that SubGen's guarantee
        pays for: the uniform samples per cluster that a given relative error of the normaliser needs grow with it.
        The paper folds the scale into q; here it is explicit. For a sense of size: e^{2 * 1} = 7, e^{2 * 5} = 22026.
        """
        return self.radius.double() * self.query_norm_max[:, None] * scaling


def clusterability(keys: Tensor, queries: Tensor, limit: int = LIMIT, *, where: str = "") -> Clusterability:
    """Greedy k-center on one layer's keys [Hkv, N, D], all heads at once, with the norms of their queries
    [Hkv, Nq, D] (Nq may differ from N). Any device and dtype; results on the CPU.

    Farthest-first traversal, started at the key nearest the mean; ties go to the earlier key, so nothing is random.
    Time O(Hkv N D min(N, limit)), memory O(Hkv N D). `where` ("layer 3") goes into the errors: KvcalError for NaN or
    infinity or distances beyond float32, ValueError for shapes that do not fit or a limit below 1.
    """
    keys, queries = finite(keys, "keys", where), finite(queries, "queries", where)
    if (keys.shape[0], keys.shape[2]) != (queries.shape[0], queries.shape[2]):
        raise ValueError(f"keys {tuple(keys.shape)} and queries {tuple(queries.shape)} must share Hkv and D")
    if limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    last = min(keys.shape[1], limit)
    counts = [2**p for p in range(last.bit_length()) if 2**p < last] + [last]
    measurable(keys, where)
    measurable(queries, where)
    # By powers of two, which change no digit: float32 holds neither the squares of 1e20 nor those of 1e-30.
    size, length = power_of_two(keys), power_of_two(queries)
    norms = (queries / length).norm(dim=-1) * length
    with one_thread():  # up to `limit` short steps in a row: on a busy machine threads would wait for one another
        radius = _farthest_first(keys / size, last) * size
    return Clusterability(
        counts=torch.tensor(counts),
        radius=radius[:, torch.tensor(counts) - 1],
        query_norm_max=norms.amax(dim=-1),
        query_norm_p99=torch.stack([head.quantile(0.99) for head in norms]),  # all heads may exceed its 2^24 elements
    )


def _farthest_first(keys: Tensor, centers: int) -> Tensor:
    """keys [Hkv, N, D] -> cover radius [Hkv, centers] after each center that the traversal picks."""
    heads = torch.arange(len(keys))
    mean = keys.double().mean(dim=1, keepdim=True).float()
    chosen = _distance(keys, mean).argmin(dim=-1)
    nearest = torch.full(keys.shape[:2], torch.inf)
    radius = torch.empty(len(keys), centers)
    for count in range(centers):
        nearest = torch.minimum(nearest, _distance(keys, keys[heads, chosen][:, None]))
        chosen = nearest.argmax(dim=-1)
        radius[:, count] = nearest[heads, chosen]
    return radius


def _distance(keys: Tensor, center: Tensor) -> Tensor:
    """keys [Hkv, N, D], center [Hkv, 1, D] -> [Hkv, N]. From differences: |k|^2 - 2 k·c + |c|^2 would not be 0 at the
    center itself, nor accurate where the norms are large."""
    return torch.cdist(keys, center, compute_mode="donot_use_mm_for_euclid_dist").squeeze(-1)
