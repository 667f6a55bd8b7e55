"""Whole steps of a model on a CPU, by `cpu.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from cpu import in_turns

from kvcal.artifacts import Artifact
from kvcal.calibrate import load_model, make_blocks, open_data
from kvcal.runtime import CompressedCache, load

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    "loki": ("loki", {}),
    "spectral, its defaults": ("spectral", {}),
    "spectral, 8-bit rows, keep .027": ("spectral", {"rows": 8, "keep": 0.02702}),
}


@torch.no_grad()
def steps(name: str, folder: Path, dtype: str, length: int) -> dict[str, Any]:
    """Milliseconds of a decoded token after `length` tokens of text, by method, and bytes that caches hold."""
    stock, ours = (load_model(name, device="cpu", dtype=dtype) for _ in range(2))
    artifact: Artifact = load(folder)
    ids = tokens(stock, length + 1)
    from transformers import DynamicCache

    plain = DynamicCache(config=stock.model.config)
    stock.model(ids[:, :length], past_key_values=plain, logits_to_keep=1)
    full = CompressedCache(ours.model, None, "full")
    ours.model(ids[:, :length], past_key_values=full, logits_to_keep=1)
    routines = {"transformers": lambda: again(stock.model, plain, ids)}
    held = {}
    for method, (known, settings) in METHODS.items():
        cache = CompressedCache(ours.model, artifact, known, **settings)
        cache.adopt(full)
        held[method] = cache.resident_bytes()
        routines[method] = lambda cache=cache: again(ours.model, cache, ids)
    return {"ms": in_turns(routines), "resident_bytes": held}


def again(model: Any, cache: Any, ids: torch.Tensor) -> None:
    """Decode the last token, and take it back."""
    model(ids[:, -1:], past_key_values=cache)
    cache.crop(-1)


def tokens(loaded: Any, count: int) -> torch.Tensor:
    """[1, count] of text."""
    data = open_data("stdlib", "heldout")
    return make_blocks(data, loaded.tokenizer, num_tokens=count, seq_len=count).ids.long()
