"""The stage `codebook`: sampled tokens are assigned anew to their nearest codewords, and the rest derived from that."""

from __future__ import annotations

import torch
from torch import Tensor

from ...artifacts import Artifact
from ...artifacts.claims import require, require_that
from ..codebook import Codebook, code_moments, joint, spread_of
from ..codebook_stage import query_moments
from .bases import check_maps

ROUNDING = 1e-5
"""Allowed relative error of what is kept in float32."""


def check_codebook(artifact: Artifact, where: str) -> None:
    """Sizes, spreads and the basis of codes are those of the reservoir and the moments."""
    if not {"reservoir", "moments"} <= artifact.stages.keys():
        return
    sampled = artifact.layers_in("reservoir")
    for layer in artifact.layers_in("codebook"):
        prefix = f"layers.{layer.index}."
        require_that(
            where, f"layers.{layer.index}", layer in sampled, "of a layer that is not in the reservoir", "none"
        )
        key, value = (artifact.tensor("reservoir", layer.index, name).float() for name in ("key_post", "value"))
        stated = Codebook(
            *(artifact.tensor("codebook", layer.index, name) for name in ("key", "value", "spread", "sizes"))
        )
        covariances = (artifact.tensor("moments", layer.index, f"{name}.covariance") for name in ("key_post", "value"))
        wanted = spread_of(*covariances)
        holds = (stated.spread - wanted).abs() <= ROUNDING * wanted
        require(where, f"{prefix}spread", holds, stated.spread, "that of the stage moments")
        ids, unsure = stated.assign(key, value), _unsure(stated, key, value)
        counted = torch.stack([torch.bincount(head, minlength=stated.sizes.shape[1]) for head in ids])
        off = (stated.sizes - counted).abs()
        what = "the number of this head's sampled tokens that are nearest to it"
        require(where, f"{prefix}sizes", off <= unsure, stated.sizes, what)
        if not unsure.any():  # otherwise the basis may be of another assignment
            names = ("query_map", "key_map", "singular_values")
            found = [artifact.tensor("codebook", layer.index, f"code.{name}").double() for name in names]
            moments = code_moments(stated, key, value)
            queries = query_moments(artifact, layer)
            check_maps(where, f"{prefix}code", found, queries, moments, "the reservoir and the stage moments")


def _unsure(stated: Codebook, key: Tensor, value: Tensor) -> Tensor:
    """[Hkv, C]: how many tokens are as near to this codeword as to another, but for rounding."""
    counts = []
    codewords = joint(stated.key, stated.value, stated.spread).double()
    for points, words in zip(joint(key, value, stated.spread).double(), codewords, strict=True):
        half = words.square().sum(-1) / 2
        least = (half - points @ words.T).topk(min(2, len(words)), largest=False)
        tied = least.values[:, -1] - least.values[:, 0] <= 1e-12 * (points.square().sum(-1) + 2 * half.amax())
        tied &= len(words) > 1
        counts.append(torch.bincount(least.indices[tied].flatten(), minlength=len(words)))
    return torch.stack(counts)
