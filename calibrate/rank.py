"""How many dimensions hold how much of the variance: rank@p, participation ratio, and the report of an artifact."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..artifacts import QUANTITIES, Artifact, KvcalError


def rank_at(eigenvalues: Tensor, variance: float = 0.9) -> Tensor:
    """Smallest r whose first r eigenvalues reach a fraction `variance` of their sum, counted from one.

    Args:
        eigenvalues: [..., D], descending, not negative.
        variance: in (0, 1].

    Returns:
        [...] int64 in 1 … D.
    """
    check_variance(variance)
    cumulative = eigenvalues.to(torch.float64).cumsum(-1)
    # A part in 10^12 of slack: 3 of 10 equal parts reach 0.3 although 0.1 + 0.1 + 0.1 may not.
    target = variance * cumulative[..., -1:] * (1 - 1e-12)
    return (cumulative < target).sum(-1) + 1


def check_variance(variance: float) -> None:
    """Raises KvcalError unless 0 < variance <= 1."""
    if not 0 < variance <= 1:
        raise KvcalError(f"variance {variance}: give a fraction above 0 and at most 1, e.g. 0.9")


def participation_ratio(eigenvalues: Tensor) -> Tensor:
    """(Σλ)² / Σλ² over the last dimension: 1 for one direction, D for an even spread."""
    eigenvalues = eigenvalues.to(torch.float64)
    return eigenvalues.sum(-1) ** 2 / (eigenvalues**2).sum(-1).clamp_min(torch.finfo(torch.float64).tiny)


def rank_report(artifact: Artifact, variance: float = 0.9) -> dict[str, Any]:
    """Ranks and participation ratios from the artifact alone.

    Means are over the layers with full attention, which are those that methods compress; over all where all have a
    sliding window.

    Returns:
        {"variance", "layers": [{"layer", "window": tokens or None, "key_post": [rank of each KV head],
        "key_post_uncentred", …, "participation": {…}}], "averaged": [index of each layer in the means],
        "model": {"key_post": mean, …}, "participation": {"key_post": mean, …}}.
    """
    layers: list[dict[str, Any]] = []
    names = [f"{quantity}{suffix}" for quantity in QUANTITIES for suffix in ("", "_uncentred")]
    for layer in artifact.layers:
        ranks: dict[str, Any] = {"layer": layer.index, "window": layer.window}
        ratios = {}
        for name in names:
            eigenvalues = _eigenvalues(artifact, layer.index, name)
            ranks[name] = rank_at(eigenvalues, variance).tolist()
            ratios[name] = [round(ratio, 4) for ratio in participation_ratio(eigenvalues).tolist()]
        layers.append({**ranks, "participation": ratios})
    averaged = [layer for layer in layers if layer["window"] is None] or layers
    return {
        "variance": variance,
        "layers": layers,
        "averaged": [layer["layer"] for layer in averaged],
        "model": {name: _mean([layer[name] for layer in averaged]) for name in names},
        "participation": {name: _mean([layer["participation"][name] for layer in averaged]) for name in names},
    }


def means_are_of(report: dict[str, Any]) -> str:
    """Words to follow "sliding window": which layers the means of a `rank_report` are over; "" where none has one."""
    sliding = [layer for layer in report["layers"] if layer["window"] is not None]
    if not sliding:
        return ""
    every = len(report["layers"])
    if len(sliding) == every:
        return f"means over all {every} layers, since all have one"
    return f"means over the {every - len(sliding)} of {every} layers with full attention, which methods compress"


def _eigenvalues(artifact: Artifact, layer: int, name: str) -> Tensor:
    quantity = name.removesuffix("_uncentred")
    suffix = "eigenvalues_uncentred" if name.endswith("_uncentred") else "eigenvalues"
    return artifact.tensor("pca", layer, f"{quantity}.{suffix}")


def _mean(rows: list[list[float]]) -> float:
    values = [value for row in rows for value in row]
    return sum(values) / len(values)
