"""Where an uptraining starts: projections fitted to what the layers computed by themselves, or pooled ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...artifacts import KvcalError
from ...runtime.cla.sharing import POOLS
from ...runtime.cla.sharing_map import SharingMap
from ...runtime.wrapped import unwrapped
from ..blocks import TokenBlocks
from .attention_weights import weights_of
from .fit_pass import fit_projections

FITTED = "fitted"
STARTS = (FITTED, *POOLS)
START_TOKENS = 32768
"""Of the training text that a start is fitted on: the inputs of attention have 576 dimensions in SmolLM2-135M."""


def check_start(model: Any, sharing_map: SharingMap, pool: str) -> None:
    """Raise KvcalError for an unknown start, or one that this architecture cannot have."""
    if pool not in STARTS:
        raise KvcalError(f"pool {pool!r}: give one of {', '.join(STARTS)}")
    if pool == FITTED:
        weights_of(unwrapped(model), sharing_map)


def starting_weights(
    model: Any,
    sharing_map: SharingMap,
    blocks: TokenBlocks,
    pool: str,
    resumed: bool,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """What `share(weights=…)` is to put in the place of pooled projections.

    Args:
        model: in eval mode.
        blocks: of the training; a part of them, evenly spread, is fitted on.
        resumed: a checkpoint will fill in what the fit and the training made of these parameters: nothing is fitted.
        progress: called with (blocks done, blocks in all).
    """
    if pool != FITTED:
        return {}
    if not resumed:
        return fit_projections(model, sharing_map, _some(blocks), progress=progress)
    model = unwrapped(model)
    names = {module: name for name, module in model.named_modules()}
    return {
        f"{names[weights.attention]}.{name}": parameter
        for layer, weights in weights_of(model, sharing_map).items()
        for name, parameter in weights.parameters(stores=layer in sharing_map.storing).items()
    }


def _some(blocks: TokenBlocks) -> TokenBlocks:
    count = min(len(blocks), max(1, START_TOKENS // blocks.seq_len))
    rows = torch.linspace(0, len(blocks) - 1, count).round().long()
    kept = {name: getattr(blocks, name)[rows] for name in ("ids", "counted", "attended")}
    return dataclasses.replace(blocks, **kept)
