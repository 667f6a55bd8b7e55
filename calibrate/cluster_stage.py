"""The stage `clusters`: key clusterings of every layer of an artifact, from its reservoir."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..artifacts import Artifact, KvcalError, Stage
from .clusterability import Clusterability, clusterability
from .clustering import cluster_keys
from .warm_start import warm_start

CURVE = ("counts", "radius", "query_norm_max", "query_norm_p99")


def cluster(
    artifact: Artifact,
    *,
    clusters: int | None = None,
    tokens_per_cluster: int = 80,
    metric: str = "cosine",
    iterations: int = 20,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Artifact:
    """Cluster the sampled post-rotary keys per (layer, KV head), and measure what clustering methods assume.

    Args:
        clusters: number of clusters; by default one per `tokens_per_cluster` sampled tokens.
        progress: called with (layers done, layers in all).

    Returns:
        The artifact with the stage `clusters`; `kvcal.artifacts.save` writes it.

    Raises:
        KvcalError: fewer keys than clusters.
    """
    tokens = len(artifact.stages["reservoir"].tensors["token"]) if "reservoir" in artifact.stages else 0
    if not tokens:
        raise KvcalError(f"{artifact.name}: no reservoir of keys to cluster: calibrate again with `calibrate pca`")
    if tokens_per_cluster < 1:
        raise KvcalError(f"{tokens_per_cluster} tokens per cluster: give at least 1")
    count = clusters if clusters is not None else max(1, round(tokens / tokens_per_cluster))
    tensors: dict[str, Tensor] = {}
    total = len(artifact.layers)
    for layer in artifact.layers:
        if progress:
            progress(layer.index, total)
        where = f"layer {layer.index} of {artifact.name}"
        keys, queries, values = (
            artifact.tensor("reservoir", layer.index, name).float() for name in ("key_post", "query_post", "value")
        )
        found = cluster_keys(keys, values, clusters=count, metric=metric, iterations=iterations, seed=seed, where=where)
        curve = clusterability(keys, queries)
        # The first half of the text stands for calibration, the second for a context met at inference.
        half = tokens // 2
        saved = warm_start(
            keys[:, :half], keys[:, half:], clusters=max(1, count // 2), metric=metric, seed=seed, where=where
        )
        prefix = f"layers.{layer.index}"
        for name in ("centroids", "sizes", "radius_mean", "radius_p95", "radius_max", "value_mean"):
            tensors[f"{prefix}.{name}"] = getattr(found, name)
        tensors[f"{prefix}.inertia"] = found.inertia
        tensors[f"{prefix}.silhouette"] = found.silhouette
        for name in CURVE:
            tensors[f"{prefix}.curve.{name}"] = getattr(curve, name)
        for start in ("calibrated", "plusplus", "random"):
            for what in ("iterations", "inertia"):
                tensors[f"{prefix}.warm_start.{start}_{what}"] = getattr(saved, f"{start}_{what}")
    if progress:
        progress(total, total)
    settings = {"clusters": count, "metric": metric, "iterations": iterations, "seed": seed}
    return artifact.with_stage("clusters", Stage(tensors, settings))


def cluster_report(artifact: Artifact) -> dict[str, Any]:
    """What the stage `clusters` found, by layer, averaged over its KV heads where not said otherwise.

    Returns:
        {"settings", "layers": [{"layer", "largest", "radius_mean", "radius_p95", "radius_max", "inertia",
        "silhouette", "query_norm_max", "query_norm_p99", "clusterability": [{"clusters", "delta", "delta_r"}],
        "warm_start": {"calibrated": {"iterations", "inertia"}, "plusplus", "random"}}]}; delta is the largest
        over the heads, delta_r the largest exponent delta · r · softmax scale.
    """
    layers = []
    for layer in artifact.layers:

        def get(name: str, index: int = layer.index) -> Tensor:
            return artifact.tensor("clusters", index, name)

        curve = Clusterability(*(get(f"curve.{name}") for name in CURVE))
        delta_r = curve.delta_r(layer.scaling)
        starts = ("calibrated", "plusplus", "random")
        layers.append(
            {
                "layer": layer.index,
                "largest": int(get("sizes").max()),
                "radius_mean": _mean(get("radius_mean")),
                "radius_p95": _mean(get("radius_p95")),
                "radius_max": float(get("radius_max").max()),
                "inertia": _mean(get("inertia")),
                "silhouette": _mean(get("silhouette")),
                "query_norm_max": float(curve.query_norm_max.max()),
                "query_norm_p99": _mean(curve.query_norm_p99),
                "clusterability": [
                    {"clusters": count, "delta": delta, "delta_r": exponent}
                    for count, delta, exponent in zip(
                        curve.counts.tolist(),
                        curve.radius.amax(0).tolist(),
                        delta_r.amax(0).tolist(),
                        strict=True,
                    )
                ],
                "warm_start": {
                    start: {
                        "iterations": _mean(get(f"warm_start.{start}_iterations")),
                        "inertia": _mean(get(f"warm_start.{start}_inertia")),
                    }
                    for start in starts
                },
            }
        )
    return {"settings": dict(artifact.stages["clusters"].settings), "layers": layers}


def _mean(values: Tensor) -> float | None:
    mean = float(torch.nanmean(values.double()))
    return None if math.isnan(mean) else mean
