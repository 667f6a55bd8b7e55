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
from ..blocks import TokenBlocks
from .attention_weights import AttentionWeights
from .fit_pass import fit_projections

FITTED = "fitted"
STARTS = (FITTED, *POOLS)
TOKENS = 32768
"""Of the training text that a start is fitted on: the inputs of attention have 576 dimensions in SmolLM2-135M."""


def check_start(model: Any, sharing_map: SharingMap, pool: str) -> None:
    """Raise KvcalError for an unknown start, or one that this architecture cannot have."""
    if pool not in STARTS:
        raise KvcalError(f"pool {pool!r}: give one of {', '.join(STARTS)}")
    if pool == FITTED:
        _weights(model, sharing_map)


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
    names = {module: name for name, module in model.named_modules()}
    return {
        f"{names[weights.attention]}.{name}": parameter
        for layer, weights in _weights(model, sharing_map).items()
        for name, parameter in weights.parameters(stores=layer in sharing_map.storing).items()
    }


def _weights(model: Any, sharing_map: SharingMap) -> dict[int, AttentionWeights]:
    from ...runtime.integration.support import find_attention  # loads transformers

    attentions, config = find_attention(model), model.config.get_text_config()
    return {
        layer: AttentionWeights(layer, attentions[layer], config) for group in sharing_map.shared for layer in group
    }


def _some(blocks: TokenBlocks) -> TokenBlocks:
    count = min(len(blocks), max(1, TOKENS // blocks.seq_len))
    rows = torch.linspace(0, len(blocks) - 1, count).round().long()
    kept = {name: getattr(blocks, name)[rows] for name in ("ids", "counted", "attended")}
    return dataclasses.replace(blocks, **kept)
