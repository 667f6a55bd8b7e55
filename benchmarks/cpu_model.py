"""Whole steps of a model on a CPU, by `cpu.py`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from cpu import in_turns
from transformers import DynamicCache

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
def steps(name: str, folder: Path, dtype: str, length: int, with_first: bool) -> dict[str, Any]:
    """By method, milliseconds of a decoded token after `length` tokens of text, and, `with_first`, until the first of them
    from an empty cache; and bytes that caches hold."""
    stock, ours = (load_model(name, device="cpu", dtype=dtype) for _ in range(2))
    artifact: Artifact = load(folder)
    ids = tokens(stock, length + 1)
    plain, full = DynamicCache(config=stock.model.config), CompressedCache(ours.model, None, "full")
    for model, cache in ((stock.model, plain), (ours.model, full)):
        model(ids[:, :length], past_key_values=cache, logits_to_keep=1)
    routines = {"transformers": lambda: again(stock.model, plain, ids)}
    firsts = {"transformers": lambda: first(stock.model, DynamicCache(config=stock.model.config), ids)}
    held = {"transformers": sum(part.nbytes for layer in plain.layers for part in (layer.keys, layer.values))}
    for method, (known, settings) in METHODS.items():
        begin = partial(CompressedCache, ours.model, artifact, known, **settings)
        cache = begin()
        cache.adopt(full)
        held[method] = cache.resident_bytes()
        routines[method] = lambda cache=cache: again(ours.model, cache, ids)
        firsts[method] = lambda begin=begin: first(ours.model, begin(), ids)
    measured = {"ms": in_turns(routines), "resident_bytes": held}
    return measured | ({"first_ms": in_turns(firsts)} if with_first else {})


def first(model: Any, cache: Any, ids: torch.Tensor) -> None:
    """Prefill all tokens but the last, and decode that."""
    model(ids[:, :-1], past_key_values=cache, logits_to_keep=1)
    model(ids[:, -1:], past_key_values=cache)


def again(model: Any, cache: Any, ids: torch.Tensor) -> None:
    """Decode the last token, and take it back."""
    model(ids[:, -1:], past_key_values=cache)
    cache.crop(-1)


def tokens(loaded: Any, count: int) -> torch.Tensor:
    """[1, count] of text."""
    data = open_data("stdlib", "heldout")
    return make_blocks(data, loaded.tokenizer, num_tokens=count, seq_len=count).ids.long()
