"""The stage `reservoir`; `load` has checked its tokens and positions."""

from __future__ import annotations

import torch

from ...artifacts import Artifact
from ...artifacts.claims import bounded, require, require_that
from .moments import largest, moments_of

SINGLE = 1e-5
"""Relative to the largest number: how far a mean over the sample may be off for rounding."""


def check_sample(artifact: Artifact, where: str) -> None:
    """As many tokens as there should be, no NaN; of a sample of all tokens the mean is that of the moments."""
    tokens = len(artifact.stages["reservoir"].tensors["token"])
    counted, most = artifact.data["tokens_counted"], artifact.settings.get("reservoir")
    if type(most) is int:
        require_that(where, "token", tokens == min(most, counted), f"{tokens} tokens", f"{most} of {counted} counted")
    require_that(where, "token", tokens <= counted, f"{tokens} tokens", f"at most the {counted} counted")
    for layer in artifact.layers_in("reservoir"):
        for quantity in ("key_post", "query_post", "value"):
            name, rows = f"layers.{layer.index}.{quantity}", artifact.tensor("reservoir", layer.index, quantity)
            bounded(where, name, rows)
            if tokens == counted and quantity != "query_post" and "moments" in artifact.stages:
                found, wanted = rows.double().mean(1), moments_of(artifact, layer, quantity).mean
                allowed = SINGLE * largest(rows.double()).squeeze(-1) + torch.finfo(torch.float32).tiny
                holds = (found - wanted).abs() <= allowed
                require(where, f"{name} (its mean)", holds, found, "that of the moments: all tokens are in the sample")
