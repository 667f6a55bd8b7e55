"""Tiny models with artifacts, padded prompts, and every method with a small budget: what decoding tests share."""

from __future__ import annotations

import copy
import functools
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from architectures import build
from methods import by_form
from transformers import AttentionInterface, AttentionMaskInterface

from kvcal import artifacts
from kvcal.artifacts import Artifact
from kvcal.calibrate.blocks import TokenBlocks
from kvcal.calibrate.cla.rotation import angles_of
from kvcal.calibrate.cla.xcla import xcla
from kvcal.calibrate.one_pass import calibrate
from kvcal.runtime import METHODS, CompressedCache

SMALL: dict[str, dict[str, Any]] = {
    form: settings if form == method else {"method": method, **settings}
    for form, (method, settings) in by_form("small").items()
}
"""Every method, some in several forms; small enough that a short prompt is not read whole."""
EVICTING = [form for form, settings in SMALL.items() if not METHODS[settings.get("method", form)].keeps_all_tokens]
KEEPING = [form for form in SMALL if form not in EVICTING]
NEW = 6
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
"""float32, another order of summation."""


def close(form: str) -> dict[str, float]:
    """`CLOSE`, or what a level of an 8-bit row is worth: a key that differs in its last bit may get the next one."""
    return {"rtol": 1e-2, "atol": 2e-3} if form in ("spectral-8", "spectral-xcla", "xcla") else CLOSE


def model(name: str = "llama", seed: int = 0) -> Any:
    """One for all tests, which leave it as found. Its end of text is no token: all rows go on to the last step."""
    return _model(name, seed)


def artifact(name: str = "llama", seed: int = 0) -> Artifact:
    return _artifact(name, seed)


@functools.cache
@torch.inference_mode(False)  # whoever asks first
def _model(name: str, seed: int) -> Any:
    made = build(name, seed=seed)
    made.generation_config.eos_token_id = made.config.vocab_size
    # The padding token's embedding is zero: a decoded one would have a query of zeros, which prefers no key.
    torch.nn.init.normal_(made.get_input_embeddings().weight[0], std=0.02)
    return made


@functools.cache
@torch.inference_mode(False)
def _artifact(name: str, seed: int) -> Artifact:
    ids = torch.randint(3, 96, (4, 32), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    every = torch.ones(4, 32, dtype=torch.bool)
    twin = _model.__wrapped__(name, seed)  # the shared one may have caches now, and cannot be captured then
    made = calibrate(twin, TokenBlocks(ids, every, every, {"id": "random"}), reservoir=64)
    if made.full_layers:
        made = xcla(made, angles=angles_of(made, twin), group=2, memory=1.0)
    with tempfile.TemporaryDirectory() as folder:  # saving gives it the hash by which saved caches know it
        return replace(made, content_hash=artifacts.save(made, Path(folder) / "artifact").content_hash)


def random_ids(tokens: int, seed: int = 0) -> torch.Tensor:
    """[1, tokens]"""
    return torch.randint(3, 96, (1, tokens), generator=torch.Generator().manual_seed(seed))


def padded(*lengths: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Prompts of these lengths, padded on the left."""
    width = max(lengths)
    ids, mask = torch.zeros(2, len(lengths), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = random_ids(length, seed + row)[0]
        mask[row, width - length :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def greedy(of: Any, inputs: dict[str, torch.Tensor], new: int = NEW, **settings: Any) -> tuple[torch.Tensor, Any, Any]:
    """(all tokens [B, T], logits of the new ones [B, new, vocab], the cache)."""
    # Without a mask transformers makes one that hides padding tokens, and random models do write some.
    inputs = {"attention_mask": torch.ones_like(inputs["input_ids"]), **inputs}
    settings = {"max_new_tokens": new, "do_sample": False, **settings}
    made = of.generate(**inputs, **settings, output_logits=True, return_dict_in_generate=True)
    return made.sequences, torch.stack(made.logits, 1), made.past_key_values


def small(form: str) -> dict[str, Any]:
    """The method and all settings of a form."""
    return {"method": form, **SMALL[form]}


def make_cache(form: str, name: str = "llama", **settings: Any) -> CompressedCache:
    """A cache of a method with its small budget."""
    return CompressedCache(model(name), artifact(name), **{**small(form), **settings})


def traces(of: Any) -> Any:
    """All that attaching to a model may change."""
    modules = list(of.modules())
    hooks = [
        list(getattr(module, kind))
        for module in modules
        for kind in ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks")
    ]
    configs = [module.config._attn_implementation for module in modules if hasattr(module, "config")]
    overridden = ["forward" in vars(module) for module in modules]
    registries = [sorted(registry().keys()) for registry in (AttentionInterface, AttentionMaskInterface)]
    return copy.deepcopy((hooks, configs, overridden, registries, of.training, of.config.use_cache))


def step_logits(of: Any, ids: torch.Tensor, cache: Any, start: int, **settings: Any) -> torch.Tensor:
    """[B, tokens - start + 1, vocab]: `ids` up to `start` prefilled at once, then one token per call."""
    with torch.no_grad():
        parts = [of(ids[:, :start], past_key_values=cache, use_cache=True, **settings).logits[:, -1:]]
        for at in range(start, ids.shape[1]):
            new = ids[:, at : at + 1]
            parts.append(of(new, past_key_values=cache, use_cache=True, **settings).logits)
    return torch.cat(parts, 1)
