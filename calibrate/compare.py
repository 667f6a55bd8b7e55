"""How far two artifacts lie apart: the first question about any calibration set."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..artifacts import Artifact, MismatchError, differences
from .pca import principal_angles
from .rank import rank_at, rank_report


def compare(first: Artifact, second: Artifact, variance: float = 0.9) -> dict[str, Any]:
    """Principal angles between key subspaces, rank and spectrum differences, and what differs in how they were made.

    Subspaces are those of rank@`variance` in `first`, per layer and KV head.

    Returns:
        {"variance", "same_tensors", "same_in_both": in the stages that both have, "only_first", "only_second": the
        other stages, "differs": [{"field", "first", "second"}], "model": {"key_post": mean rank change, …}, "layers":
        [{"layer", "window", "key_pre": {"rank", "rank_change", "overlap", "largest_angle", "spectrum_change"},
        "key_post": {…}}]}; overlap is the mean cos² of the principal angles (1: the same subspace), angles are in
        degrees, spectrum_change is Σ|λ - λ'| / Σλ; lists have one entry per KV head.

    Raises:
        MismatchError: the artifacts have different shapes.
    """
    shapes = [[(layer.kv_heads, layer.head_dim) for layer in artifact.layers] for artifact in (first, second)]
    if shapes[0] != shapes[1]:
        raise MismatchError(
            f"{first.name} and {second.name} cannot be compared: they are of models with other shapes "
            f"({_describe(first)}; {_describe(second)})"
        )
    layers: list[dict[str, Any]] = []
    for layer in first.layers:
        entry: dict[str, Any] = {"layer": layer.index, "window": layer.window}
        for quantity in ("key_pre", "key_post"):
            spectra = [a.tensor("pca", layer.index, f"{quantity}.eigenvalues") for a in (first, second)]
            rows = [a.tensor("pca", layer.index, f"{quantity}.components") for a in (first, second)]
            ranks, other_ranks = (rank_at(values, variance) for values in spectra)
            angles = [
                principal_angles(rows[0][head, :rank], rows[1][head, :rank]) for head, rank in enumerate(ranks.tolist())
            ]
            entry[quantity] = {
                "rank": ranks.tolist(),
                "rank_change": (other_ranks - ranks).tolist(),
                "overlap": [float(found.cos().square().mean()) for found in angles],
                "largest_angle": [math.degrees(float(found.max())) for found in angles],
                "spectrum_change": ((spectra[0] - spectra[1]).abs().sum(-1) / spectra[0].sum(-1)).tolist(),
            }
        layers.append(entry)
    only_first, only_second = (
        sorted(one.stages.keys() - other.stages.keys()) for one, other in ((first, second), (second, first))
    )
    same = _same_tensors(first, second)
    means = [rank_report(artifact, variance)["model"] for artifact in (first, second)]
    return {
        "variance": variance,
        "same_tensors": same and not only_first and not only_second,
        "same_in_both": same,
        "only_first": only_first,
        "only_second": only_second,
        "differs": _provenance(first, second),
        "model": {name: means[1][name] - means[0][name] for name in means[0]},
        "layers": layers,
    }


def _provenance(first: Artifact, second: Artifact) -> list[dict[str, Any]]:
    found = []
    for title in ("model", "data", "settings", "versions"):
        sides = [getattr(artifact, title) for artifact in (first, second)]
        mappings = [side if isinstance(side, dict) else vars(side) for side in sides]
        found += [
            {"field": f"{title}.{name}", "first": here, "second": there} for name, here, there in differences(*mappings)
        ]
    return found


def _same_tensors(first: Artifact, second: Artifact) -> bool:
    """Of the stages that both have."""
    for name in first.stages.keys() & second.stages.keys():
        stage, other = first.stages[name], second.stages[name].tensors
        if stage.tensors.keys() != other.keys():
            return False
        if not all(_same(tensor, other[key]) for key, tensor in stage.tensors.items()):
            return False
    return True


def _same(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    # What was not measured, e.g. pairs of layers in the stage `cla`, is NaN on both sides.
    return torch.allclose(first, second, rtol=0, atol=0, equal_nan=True)


def _describe(artifact: Artifact) -> str:
    layer = artifact.layers[0]
    return f"{artifact.model.id}: {len(artifact.layers)} layers, {layer.kv_heads} KV heads, head dim {layer.head_dim}"
