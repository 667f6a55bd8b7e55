"""Whole steps of a model on a CPU."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from kvcal.artifacts import Artifact
from kvcal.calibrate import load_model, make_blocks, open_data
from kvcal.runtime import CompressedCache, load
from kvcal.runtime.integration.layer import CompressedLayer

from .turns import ROUNDS, in_turns

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    "loki": ("loki", {}),
    "spectral, its defaults": ("spectral", {}),
    "spectral, 8-bit rows, keep .027": ("spectral", {"rows": 8, "keep": 0.02702}),
}
SPARE = 2 * ROUNDS
"""Tokens of text beyond those held at first: every round decodes one more."""


@torch.no_grad()
def steps(name: str, folder: Path, dtype: str, length: int, with_first: bool) -> dict[str, Any]:
    """By method, milliseconds of a decoded token after `length` tokens of text; bytes that its cache holds; and,
    `with_first`, milliseconds from an empty cache to that token."""
    stock, ours = (load_model(name, device="cpu", dtype=dtype) for _ in range(2))
    artifact: Artifact = load(folder)
    ids = tokens(stock, length + SPARE)
    full = CompressedCache(ours.model, None, "full")
    ours.model(ids[:, :length], past_key_values=full, logits_to_keep=1)
    plain, prompt = of_transformers(full, stock.model.config), ids[:, : length + 1]
    routines = {"transformers": lambda: decode_next(stock.model, plain, ids)}
    firsts = {"transformers": lambda: first(stock.model, DynamicCache(config=stock.model.config), prompt)}
    held = {"transformers": sum(part.nbytes for layer in plain.layers for part in (layer.keys, layer.values))}
    for method, (known, settings) in METHODS.items():
        begin = partial(CompressedCache, ours.model, artifact, known, **settings)
        cache = begin()
        cache.adopt(full)
        held[method] = cache.resident_bytes()
        routines[method] = lambda cache=cache: decode_next(ours.model, cache, ids)
        firsts[method] = lambda begin=begin: first(ours.model, begin(), prompt)
    measured = {"ms": in_turns(routines), "resident_bytes": held}
    return measured | ({"first_ms": in_turns(firsts)} if with_first else {})


def first(model: Any, cache: Any, ids: torch.Tensor) -> None:
    """Prefill all tokens but the last, and decode that."""
    model(ids[:, :-1], past_key_values=cache, logits_to_keep=1)
    model(ids[:, -1:], past_key_values=cache)


def decode_next(model: Any, cache: Any, ids: torch.Tensor) -> None:
    """Decode the token that follows what the cache holds."""
    held = cache.get_seq_length()
    model(ids[:, held : held + 1], past_key_values=cache)


def of_transformers(full: CompressedCache, config: Any) -> DynamicCache:
    """transformers' own cache with the tokens of `full`: long prompts take minutes."""
    plain = DynamicCache(config=config)
    for number, layer in enumerate(full.layers):
        if isinstance(layer, CompressedLayer):
            key, value, *_ = layer.store.as_they_came()
            plain.update(key.contiguous(), value.contiguous(), number)
        else:  # of a sliding window, which stays transformers' own
            plain.layers[number] = copy.deepcopy(layer)
    return plain


def tokens(loaded: Any, count: int) -> torch.Tensor:
    """[1, count] of text."""
    data = open_data("stdlib", "heldout")
    return make_blocks(data, loaded.tokenizer, num_tokens=count, seq_len=count).ids.long()
