"""The stage `clusters`: key clusterings of every layer with full attention of an artifact, from its reservoir."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..artifacts import Artifact, KvcalError, Stage
from .clusterability import Clusterability, clusterability
from .clustering import cluster_keys
from .distributed import SINGLE, World
from .reservoir import sampled_tokens
from .warm_start import warm_start

CURVE = ("counts", "radius", "query_norm_max", "query_norm_p99")


def cluster(
    artifact: Artifact,
    *,
    clusters: int | None = None,
    tokens_per_cluster: int = 32,
    metric: str = "cosine",
    iterations: int = 20,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    world: World = SINGLE,
) -> Artifact:
    """Cluster the sampled post-rotary keys per (layer, KV head), and measure what clustering methods assume.

    Args:
        clusters: number of clusters; by default one per `tokens_per_cluster` sampled tokens.
        progress: called with (KV heads done, KV heads in all), of this rank's share.
        world: the processes that share the heads of all layers.

    Returns:
        The artifact with the stage `clusters`, the same on every rank; `kvcal.artifacts.save` writes it on rank 0.

    Raises:
        KvcalError: no reservoir, fewer keys than clusters, or no layer with full attention.
    """
    artifact.require("reservoir")
    tokens = sampled_tokens(artifact)
    if tokens < 2:
        raise KvcalError(f"{artifact.name}: a reservoir of one token, which makes no clusters: calibrate on more text")
    if tokens_per_cluster < 1:
        raise KvcalError(f"{tokens_per_cluster} tokens per cluster: give at least 1")
    layers = [layer for layer in artifact.layers_in("reservoir") if layer.window is None]
    if not layers:
        raise KvcalError(
            f"{artifact.name}: all layers have a sliding window and keep the model's own cache: nothing uses clusters"
        )
    count = clusters if clusters is not None else max(1, round(tokens / tokens_per_cluster))
    heads = [(layer.index, head) for layer in layers for head in range(layer.kv_heads)]
    mine = [heads[index] for index in world.deal(len(heads))]
    found: dict[str, Tensor] = {}
    for done, (layer, head) in enumerate(mine):
        if progress:
            progress(done, len(mine))
        world.check()
        keys, queries, values = (
            artifact.tensor("reservoir", layer, name)[head : head + 1].float()
            for name in ("key_post", "query_post", "value")
        )
        where = f"layer {layer}, KV head {head} of {artifact.name}"
        for name, tensor in _cluster_head(keys, queries, values, count, metric, iterations, seed, where).items():
            found[f"{layer} {head} {name}"] = tensor
    if progress:
        progress(len(mine), len(mine))
    found = {name: part for rank in range(world.size) for name, part in _from(world, rank, found).items()}
    names = [name.split(" ", 2)[2] for name in found if name.startswith(f"{layers[0].index} 0 ")]
    tensors = {
        f"layers.{layer.index}.{name}": _join(
            name, [found[f"{layer.index} {head} {name}"] for head in range(layer.kv_heads)]
        )
        for layer in layers
        for name in names
    }
    settings = {"clusters": count, "metric": metric, "iterations": iterations, "seed": seed}
    return artifact.with_stage("clusters", Stage(tensors, settings))


def _cluster_head(
    keys: Tensor,
    queries: Tensor,
    values: Tensor,
    clusters: int,
    metric: str,
    iterations: int,
    seed: int,
    where: str,
) -> dict[str, Tensor]:
    """The stage's tensors, by name, of one head: keys, queries and values [1, N, D]."""
    found = cluster_keys(keys, values, clusters=clusters, metric=metric, iterations=iterations, seed=seed, where=where)
    curve = clusterability(keys, queries, where=where)
    # The first half of the text stands for calibration, the second for a context met at inference.
    half = keys.shape[1] // 2
    comparison = warm_start(
        keys[:, :half], keys[:, half:], clusters=max(1, clusters // 2), metric=metric, seed=seed, where=where
    )
    fields = ("centroids", "sizes", "radius_mean", "radius_p95", "radius_max", "value_mean", "inertia", "silhouette")
    tensors = {name: getattr(found, name) for name in fields}
    tensors |= {f"curve.{name}": getattr(curve, name) for name in CURVE}
    for start in ("calibrated", "plusplus", "random"):
        for what in ("iterations", "inertia"):
            tensors[f"warm_start.{start}_{what}"] = getattr(comparison, f"{start}_{what}")
    return tensors


def _join(name: str, heads: list[Tensor]) -> Tensor:
    """A tensor of all heads of a layer; the counts of the curve are the same for all."""
    return heads[0] if name == "curve.counts" else torch.cat(heads)


def _from(world: World, rank: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that `rank` found, on every rank."""
    return world.broadcast(None, tensors, rank)[1]


def cluster_report(artifact: Artifact) -> dict[str, Any]:
    """What the stage `clusters` found, by layer, averaged over its KV heads where not said otherwise.

    Returns:
        {"settings", "layers": [{"layer", "largest", "radius_mean", "radius_p95", "radius_max", "inertia",
        "silhouette", "query_norm_max", "query_norm_p99", "clusterability": [{"clusters", "delta", "delta_r"}],
        "warm_start": {"calibrated": {"iterations", "inertia"}, "plusplus", "random"}}]}; delta is the largest
        over the heads, delta_r the largest exponent delta · r · softmax scale.
    """
    layers = []
    for layer in artifact.layers_in("clusters"):

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
