"""A tiny model and text on which uptraining has something to learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from architectures import build

from kvcal.calibrate.blocks import TokenBlocks
from kvcal.calibrate.cla.uptraining import Uptrained, Uptraining, uptrain
from kvcal.runtime.cla import SharingMap

GROUPS = SharingMap.parse("0-1,2")
STEPS = 6


def blocks(count: int = 10, length: int = 16, seed: int = 0) -> TokenBlocks:
    """Rows that count upwards from somewhere; the last one ends early."""
    start = torch.randint(3, 60, (count, 1), generator=torch.Generator().manual_seed(seed))
    ids = (start + torch.arange(length)).to(torch.int32)
    attended = torch.ones(count, length, dtype=torch.bool)
    attended[-1, length // 2 :] = False
    return TokenBlocks(ids, attended.clone(), attended, {"id": "counting"})


def train(model: Any, beside: Path | None = None, sharing_map: SharingMap = GROUPS, **settings: Any) -> Uptrained:
    own = {name: settings.pop(name) for name in ("pool", "resume", "checkpoint_every", "progress") if name in settings}
    training = Uptraining(**{"steps": STEPS, "lr": 3e-3, "batch_size": 4, **settings})
    return uptrain(model, blocks(), sharing_map, training, beside=beside, **own)


def with_dropout(seed: int = 0) -> Any:
    model = build("llama", seed=seed)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.2
    return model
