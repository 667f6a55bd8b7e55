"""Whether an artifact and its model allow the sharing that is asked for, said before anything is measured."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from ...artifacts import Artifact, KvcalError
from ...runtime.cla.sharing_map import SharingMap
from ..reservoir import sampled_tokens
from .pairs import can_share
from .patterns import PATTERNS, pattern_groups

_FEWEST_TOKENS = 32


def shareable_layers(artifact: Artifact) -> list[int]:
    """The layers with full attention, ascending: those that can share."""
    return [layer.index for layer in artifact.layers if layer.window is None]


def default_stored(artifact: Artifact, group: int) -> int:
    """Layers that `auto` lets store keys and values when it is not told."""
    return math.ceil(len(shareable_layers(artifact)) / group)


def check_sample(artifact: Artifact) -> None:
    """Raise KvcalError for an artifact without a reservoir to measure on, or with too small a one."""
    artifact.require("reservoir")
    if (tokens := sampled_tokens(artifact)) < _FEWEST_TOKENS:
        raise KvcalError(
            f"{artifact.name}: a reservoir of {tokens} tokens, sharing is measured on at least {_FEWEST_TOKENS}: "
            "calibrate again with `calibrate pca`"
        )


def requested_map(
    artifact: Artifact, *, group: int = 2, pattern: str = "uniform", stored_layers: int | None = None
) -> SharingMap | None:
    """The map that these settings stand for; None for `auto`, which has to measure first. See `share`.

    Raises:
        KvcalError: settings that this model cannot have.
    """
    layers = shareable_layers(artifact)
    sliding = len(artifact.layers) - len(layers)
    if len(layers) < 2:
        which = f" and {sliding} with sliding attention, which never share" if sliding else ""
        raise KvcalError(
            f"{artifact.model.id} has {len(layers)} full-attention layers{which}: sharing needs at least 2"
        )
    if pattern == "auto":
        if stored_layers is None:
            pattern_groups("uniform", layers, group)
        elif not 1 <= stored_layers <= len(layers):
            raise KvcalError(f"{stored_layers} stored layers: give 1 to {len(layers)}, its full-attention layers")
        return None
    if pattern in PATTERNS:
        found = SharingMap(pattern_groups(pattern, layers, group, stored_layers))
    elif pattern[:1].isdigit():
        found = SharingMap.parse(pattern)
        if stored_layers is not None:
            raise KvcalError(f"groups {pattern}: they say how many layers are stored: leave --budget-layers out")
    else:
        pattern_groups(pattern, layers)
        raise AssertionError("an unknown pattern is refused")
    found.check(layers, len(artifact.layers))
    refuse_other_kinds(artifact, found)
    return found


def refuse_other_kinds(artifact: Artifact, sharing_map: SharingMap) -> None:
    """Raise KvcalError when layers of a group differ in shape or rotary embedding."""
    for shared in sharing_map.shared:
        if different := [
            layer for layer in shared if not can_share(artifact.layers[shared[0]], artifact.layers[layer])
        ]:
            raise KvcalError(
                f"layers {shared[0]} and {different[0]} differ in their KV heads, head dim or rotary embedding "
                "and cannot share: give them groups of their own"
            )


def refuse_to_lose(artifact: Artifact, overwrite: bool) -> None:
    """Raise KvcalError when a stage `cla` with fitted or trained weights would be replaced unasked."""
    stage = artifact.stages.get("cla")
    if stage is not None and not overwrite and any(name.startswith("weights.") for name in stage.tensors):
        raise KvcalError(
            f"{artifact.name}: its stage cla (groups {stage.settings.get('groups')}) has fitted or "
            "trained weights: give --uptrain --continue to train on, --force to replace them, or work on a copy"
        )


def check_can_share(artifact: Artifact, model: Any, requested: SharingMap | None) -> None:
    """Raise KvcalError, with the reason, when this model's layers cannot share as requested; it is left as found.

    Args:
        requested: None where the map is not chosen yet: then the first two neighbours of one shape are tried.
    """
    from ...runtime.cla.sharing import shared  # imports transformers

    if requested is None:
        layers = shareable_layers(artifact)
        kinds = artifact.layers
        pair = next((pair for pair in pairwise(layers) if can_share(*(kinds[layer] for layer in pair))), ())
        requested = SharingMap((*((layer,) for layer in layers if layer not in pair), *([pair] if pair else [])))
    with shared(model, requested, pool="first"):
        pass
