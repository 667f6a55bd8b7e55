"""The stage `clusters`: sampled keys are assigned anew to the stated centroids, which are not searched for anew."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from ...artifacts import Artifact
from ...artifacts.claims import require, require_that
from ..clusterability import LIMIT
from ..clustering import radii, squared_distances, to_metric_space

SINGLE = 1e-5
"""Allowed relative error of distances, norms and means that are kept in float32."""
NAMES = (
    *("centroids", "sizes", "radius_mean", "radius_p95", "radius_max", "value_mean", "inertia"),
    *("curve.counts", "curve.radius", "curve.query_norm_max", "curve.query_norm_p99"),
)


def check_clusters(artifact: Artifact, where: str) -> None:
    """Sizes, radii, mean values, inertia and norms are those of the reservoir's keys, values and queries."""
    if "reservoir" not in artifact.stages:
        return
    metric = artifact.stages["clusters"].settings["metric"]
    sampled = artifact.layers_in("reservoir")
    for layer in artifact.layers_in("clusters"):
        in_sample = layer in sampled
        require_that(where, f"layers.{layer.index}", in_sample, "of a layer that is not in the reservoir", "none")
        prefix = f"layers.{layer.index}."
        key, query, value = (
            artifact.tensor("reservoir", layer.index, name).float() for name in ("key_post", "query_post", "value")
        )
        stated = {name: artifact.tensor("clusters", layer.index, name) for name in NAMES}
        points = to_metric_space(key, metric, f"{where}, layer {layer.index}")
        found = [_of_head(*parts) for parts in zip(points, value, stated["centroids"], strict=True)]
        anew = {name: torch.stack([head[name] for head in found]) for name in found[0]}
        _compare(where, prefix, stated, anew)
        _check_curve(where, prefix, stated, key, query)


def _of_head(points: Tensor, values: Tensor, centroids: Tensor) -> dict[str, Tensor]:
    """The stage's tensors of one head, from points [N, D], values [N, Dv] and the stated centroids [C, D].

    Besides: `unsure` [C], how many keys of a cluster may as well be another's, and `reach`, the largest value.
    """
    centroids, clusters = centroids.double(), len(centroids)
    half = centroids.square().sum(-1) / 2
    scores = half - points.double() @ centroids.T
    labels = scores.argmin(-1)
    least = scores.topk(min(2, clusters), largest=False)
    # A key that is as near to two centroids may be with either: on another machine rounding may decide otherwise.
    tied = least.values[:, -1] - least.values[:, 0] <= 1e-12 * (points.double().square().sum(-1) + 2 * half.amax())
    unsure = torch.bincount(least.indices[tied].flatten(), minlength=clusters) if clusters > 1 else labels[:1] * 0
    sizes = torch.bincount(labels, minlength=clusters)
    squared = squared_distances(points, centroids, labels)
    order = sizes.argsort(descending=True, stable=True)
    mean, p95, most = (part[order.argsort()] for part in radii(squared.sqrt(), order.argsort()[labels], sizes[order]))
    total = torch.zeros(clusters, values.shape[1], dtype=torch.float64).index_add_(0, labels, values.double())
    return {
        "sizes": sizes,
        "unsure": unsure,
        "radius_mean": mean,
        "radius_p95": p95,
        "radius_max": most,
        "value_mean": total / sizes.clamp_min(1).unsqueeze(-1),
        "inertia": squared.sum(),
        "reach": values.abs().max().double(),
    }


def _compare(where: str, prefix: str, stated: Mapping[str, Tensor], anew: Mapping[str, Tensor]) -> None:
    name, unsure = f"{prefix}sizes", anew["unsure"]
    holds = (stated["sizes"] - anew["sizes"]).abs() <= unsure
    require(where, name, holds, stated["sizes"], "the number of this head's sampled keys that are nearest to it")
    sure = unsure == 0
    allowed = SINGLE * anew["radius_max"].amax(1, keepdim=True) + torch.finfo(torch.float32).tiny
    for part in ("radius_mean", "radius_p95", "radius_max"):
        holds = ((stated[part] - anew[part]).abs() <= allowed) | ~sure
        require(where, prefix + part, holds, stated[part], "that of the sampled keys nearest to it")
    off = (stated["value_mean"] - anew["value_mean"]).abs()
    holds = (off <= SINGLE * anew["reach"].view(-1, 1, 1)) | ~sure.unsqueeze(-1)
    require(where, f"{prefix}value_mean", holds, stated["value_mean"], "the mean value of the sampled tokens nearest")
    holds = (stated["inertia"] - anew["inertia"]).abs() <= SINGLE * anew["inertia"]
    require(where, f"{prefix}inertia", holds, stated["inertia"], "the sum of squared distances to the nearest")


def _check_curve(where: str, prefix: str, stated: Mapping[str, Tensor], key: Tensor, query: Tensor) -> None:
    counts, radius, tokens = stated["curve.counts"], stated["curve.radius"], key.shape[1]
    name = f"{prefix}curve.counts"
    require_that(where, name, int(counts[-1]) == min(tokens, LIMIT), int(counts[-1]), f"last {min(tokens, LIMIT)}")
    # The first center is the key nearest the mean; rounding may decide which key that is.
    spread = (key - key.double().mean(1, keepdim=True)).norm(dim=-1).amax(1)
    holds = (radius[:, 0] >= 0.499 * spread) & (radius[:, 0] <= 2.001 * spread)
    require(where, f"{prefix}curve.radius", holds, radius[:, 0], "half to twice the largest distance from the mean")
    if tokens <= LIMIT:
        require(where, f"{prefix}curve.radius", radius[:, -1:] == 0, radius[:, -1:], "0 where every key is a center")
    norms = query.norm(dim=-1)
    quantile = torch.stack([head.quantile(0.99) for head in norms])
    same = partial(torch.isclose, rtol=SINGLE, atol=0)
    for part, wanted in (("max", norms.amax(-1)), ("p99", quantile)):
        name, found = f"{prefix}curve.query_norm_{part}", stated[f"curve.query_norm_{part}"]
        require(where, name, same(found, wanted), found, "that of the sampled queries' norms")
