"""The stage `moments`."""

from __future__ import annotations

import torch
from torch import Tensor

from ...artifacts import QUANTITIES, Artifact, Layer
from ...artifacts.claims import MOST, bounded, require, require_that
from ..moments import Moments

ROUNDING = 1e-9
"""Allowed error relative to the largest entry: float64 sums and eigenvalues of a thousand dimensions round by 1e-12."""


def check_moments(artifact: Artifact, where: str) -> None:
    """Counts are those of the counted tokens, covariances symmetric and not negative."""
    for layer in artifact.layers:
        for quantity in QUANTITIES:
            name = f"layers.{layer.index}.{quantity}"
            found = moments_of(artifact, layer, quantity)
            counted = artifact.data["tokens_counted"]
            wanted = counted * (layer.query_heads // layer.kv_heads if quantity.startswith("query") else 1)
            require_that(where, f"{name}.count", found.count == wanted, found.count, f"{wanted}, of {counted} tokens")
            require_that(where, f"{name}.count", found.count >= 2, found.count, "at least 2")
            bounded(where, f"{name}.mean", found.mean)
            bounded(where, f"{name}.covariance", found.covariance, -(MOST**2), MOST**2)
            _check_covariance(where, f"{name}.covariance", found.covariance)
            if layer.pre_rotary == "none" and quantity.endswith("_pre"):
                post = moments_of(artifact, layer, quantity.replace("_pre", "_post"))
                for part in ("mean", "covariance"):
                    pre, same = getattr(found, part), getattr(post, part)
                    require(where, f"{name}.{part}", pre == same, pre, "that after a rotary embedding, there is none")


def moments_of(artifact: Artifact, layer: Layer, quantity: str) -> Moments:
    """Moments of one quantity of one layer."""
    count, mean, covariance = (
        artifact.tensor("moments", layer.index, f"{quantity}.{part}") for part in ("count", "mean", "covariance")
    )
    return Moments(int(count), mean, covariance)


def largest(values: Tensor) -> Tensor:
    """[Hkv, 1, …] largest magnitude of each KV head."""
    return values.abs().flatten(1).amax(1).view(-1, *[1] * (values.dim() - 1))


def _check_covariance(where: str, name: str, covariance: Tensor) -> None:
    allowed = ROUNDING * largest(covariance)
    holds = (covariance - covariance.mT).abs() <= allowed
    require(where, name, holds, covariance, "a symmetric matrix")
    values = torch.linalg.eigvalsh(covariance)
    holds = values >= -allowed.squeeze(-1) * values.shape[-1]
    require(where, f"{name} (its eigenvalues, ascending)", holds, values, "none below 0")
