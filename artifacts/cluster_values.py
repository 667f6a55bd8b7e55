"""Checks of the stages `clusters` and `codebook`, as far as they need none of the keys that were clustered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .claims import MEAN_ROUNDING, MOST, ROUNDING, bounded, descending, require, require_that

METRICS = ("cosine", "l2")
MOST_ITERATIONS = 20
"""Iterations in the comparison of warm starts, at most."""
MOST_CODEWORDS = 256
"""A token names its codeword in one byte."""


def check_clusters(where: str, tensors: Mapping[str, Tensor], prefix: str, settings: Mapping[str, Any]) -> None:
    """Raise ArtifactError for values of one layer that no clustering has."""
    names = [name for name in tensors if name.startswith(prefix)]
    found = {name.removeprefix(prefix): tensors[name] for name in names}
    metric, clusters = settings.get("metric"), settings.get("clusters")
    require_that(where, "metric of stage clusters", metric in METRICS, metric, " or ".join(METRICS))
    given = found["sizes"].shape[1]
    require_that(where, f"{prefix}sizes", given == clusters and given > 0, f"of {given} clusters", f"{clusters} > 0")
    keys = _check_sizes(where, prefix, found)
    bounded(where, f"{prefix}centroids", found["centroids"])
    if metric == "cosine":
        length = found["centroids"].double().norm(dim=-1)
        require(where, f"{prefix}centroids", (length - 1).abs() <= ROUNDING, length, "unit length")
    _check_radii(where, prefix, found)
    bounded(where, f"{prefix}value_mean", found["value_mean"])
    silhouette = found["silhouette"]
    holds = silhouette.isnan() | (silhouette.abs() <= 1)
    require(where, f"{prefix}silhouette", holds, silhouette, "-1 to 1, or NaN where it is undefined")
    _check_curve(where, prefix, found)
    for name, tensor in found.items():
        if name.endswith("inertia"):
            bounded(where, prefix + name, tensor, 0, 4 * MOST**2 * keys)
        if name.endswith("_iterations"):
            bounded(where, prefix + name, tensor, 1, MOST_ITERATIONS)


def check_codebook(where: str, tensors: Mapping[str, Tensor], prefix: str, settings: Mapping[str, Any]) -> None:
    """Raise ArtifactError for values of one layer that no codebook has."""
    names = [name for name in tensors if name.startswith(prefix)]
    found = {name.removeprefix(prefix): tensors[name] for name in names}
    given, stated = found["sizes"].shape[1], settings.get("codewords")
    fits = given == stated and 1 <= given <= MOST_CODEWORDS
    require_that(where, f"{prefix}sizes", fits, f"of {given} codewords", f"{stated}, 1 to {MOST_CODEWORDS}")
    _check_sizes(where, prefix, found)
    for name in ("key", "value"):
        bounded(where, prefix + name, found[name])
    bounded(where, f"{prefix}spread", found["spread"], torch.finfo(torch.float32).tiny, MOST)
    if "carry.sizes" not in found:
        return
    sizes = found["carry.sizes"]
    rises = torch.ones_like(sizes, dtype=torch.bool)
    rises[1:] = sizes[1:] > sizes[:-1]
    holds = rises & (sizes >= 1) & (sizes <= MOST_CODEWORDS)
    require(where, f"{prefix}carry.sizes", holds, sizes, f"1 to {MOST_CODEWORDS}, ascending", by_head=False)
    for name, tensor in found.items():
        if name.startswith("carry.") and name != "carry.sizes":
            bounded(where, prefix + name, tensor, 0)


def _check_sizes(where: str, prefix: str, found: Mapping[str, Tensor]) -> int:
    """Check the sizes of clusters, and return how many keys were clustered."""
    name, sizes = f"{prefix}sizes", found["sizes"]
    require(where, name, (sizes >= 0) & (sizes < 1 << 40), sizes, "the number of a cluster's keys")
    descending(where, name, sizes)
    total = sizes.sum(1)
    require(where, f"{name} (their sum)", (total == total[0]) & (total > 0), total, "the number of keys in every head")
    return int(total[0])


def _check_radii(where: str, prefix: str, found: Mapping[str, Tensor]) -> None:
    most = found["radius_max"]
    bounded(where, f"{prefix}radius_max", most, 0, 2 * MOST)
    for part in ("radius_mean", "radius_p95"):
        holds = (found[part] >= 0) & (found[part] <= most * (1 + MEAN_ROUNDING))
        require(where, prefix + part, holds, found[part], "0 to radius_max")


def _check_curve(where: str, prefix: str, found: Mapping[str, Tensor]) -> None:
    counts, radius = found["curve.counts"], found["curve.radius"]
    require_that(where, f"{prefix}curve.counts", 0 < len(counts) < 40, f"of {len(counts)} entries", "1, 2, 4, …")
    holds = counts == 2 ** torch.arange(len(counts))
    if len(counts) > 1:
        holds[-1] = counts[-2] < counts[-1] <= 2 * counts[-2]
    expected = "1, 2, 4, … and last the number of keys, at most 1024"
    require(where, f"{prefix}curve.counts", holds & (counts <= 1024), counts, expected, by_head=False)
    bounded(where, f"{prefix}curve.radius", radius, 0, 2 * MOST)
    descending(where, f"{prefix}curve.radius", radius)
    longest, usual = found["curve.query_norm_max"], found["curve.query_norm_p99"]
    bounded(where, f"{prefix}curve.query_norm_max", longest, 0, 2 * MOST)
    holds = (usual >= 0) & (usual <= longest * (1 + MEAN_ROUNDING))
    require(where, f"{prefix}curve.query_norm_p99", holds, usual, "0 to query_norm_max")
