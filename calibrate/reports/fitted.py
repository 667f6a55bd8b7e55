"""What an artifact's tensors say of a model, layer by layer: ranks, spectra and clusterability."""

from __future__ import annotations

from dataclasses import dataclass

from ...artifacts import QUANTITIES, Artifact
from ..cluster_stage import cluster_report
from ..rank import rank_report

VARIANCE = 0.9
MOST_DIMS = 32
"""Points of a spectrum's curve, beside powers of two: all dimensions up to 16, then ever fewer, and the last."""
NAMES = {
    "key_pre": "keys before rotation",
    "key_post": "keys after rotation",
    "query_pre": "queries before rotation",
    "query_post": "queries after rotation",
    "value": "values",
}


@dataclass(frozen=True)
class Rank:
    """Dimensions that hold `VARIANCE` of the variance of one quantity in one head."""

    quantity: str
    layer: int
    head: int
    """Of keys and values; queries are those of the head's group."""
    rank: int
    dims: int
    """Of the head."""
    window: int | None
    """Tokens that a layer with a sliding window sees."""


@dataclass(frozen=True)
class Spectrum:
    """The share of the variance that the first dimensions of a basis hold, mean of a layer's heads."""

    quantity: str
    layer: int
    dims: tuple[int, ...]
    explained: tuple[float, ...]
    """0 to 1, at each of `dims`."""


@dataclass(frozen=True)
class Cover:
    """How far a layer's keys are from the nearest of so many centers, in the worst head."""

    layer: int
    clusters: tuple[int, ...]
    radius: tuple[float, ...]
    """Relative to one cluster's."""


def ranks(artifact: Artifact) -> list[Rank]:
    dims = {layer.index: layer for layer in artifact.layers}
    return [
        Rank(
            quantity,
            entry["layer"],
            head,
            rank,
            dims[entry["layer"]].value_dim if quantity == "value" else dims[entry["layer"]].head_dim,
            entry["window"],
        )
        for entry in rank_report(artifact, VARIANCE)["layers"]
        for quantity in QUANTITIES
        for head, rank in enumerate(entry[quantity])
    ]


def spectra(artifact: Artifact) -> list[Spectrum]:
    found = []
    for quantity in QUANTITIES:
        for layer in artifact.layers:
            values = artifact.tensor("pca", layer.index, f"{quantity}.eigenvalues").double()
            total = values.sum(-1, keepdim=True).clamp_min(1e-300)
            explained = (values.cumsum(-1) / total).mean(0)
            dims = shown_dims(explained.shape[-1])
            found.append(
                Spectrum(quantity, layer.index, dims, tuple(round(float(explained[dim - 1]), 5) for dim in dims))
            )
    return found


def shown_dims(most: int) -> tuple[int, ...]:
    """Counts of dimensions at which a spectrum of `most` is drawn, ascending, `most` the last."""
    wide = {round(16 * (most / 16) ** (step / (MOST_DIMS - 16))) for step in range(MOST_DIMS - 16 + 1)}
    powers = {2**power for power in range(most.bit_length())}
    return tuple(sorted(dim for dim in {*range(1, 17), *powers, *wide, most} if dim <= most))


def covers(artifact: Artifact) -> list[Cover]:
    """[] where the artifact has no stage `clusters`."""
    if "clusters" not in artifact.stages:
        return []
    found = []
    for entry in cluster_report(artifact)["layers"]:
        curve = entry["clusterability"]
        first = curve[0]["delta"] or 1.0
        clusters = tuple(point["clusters"] for point in curve)
        found.append(Cover(entry["layer"], clusters, tuple(round(point["delta"] / first, 5) for point in curve)))
    return found
