"""A transformers model's parts: its decoder, and its attention modules, found by watching a forward pass."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import torch
from torch import Tensor

from ...artifacts import KvcalError
from .implementations import PREFIX, Route

UNSUPPORTED = "this architecture is not supported (docs/architectures.md lists those that are)"
_numbers = itertools.count()


@contextmanager
def routed(model: Any, attention: Callable[..., Any], masks: str) -> Iterator[None]:
    """Inside, every attention call of `model` is a call of `attention`.

    Args:
        attention: called as transformers calls one: (module, query [B, Hq, T, D], key, value, mask, **kwargs) ->
            (output [B, T, Hq, Dv], weights or None).
        masks: whose masks it gets, e.g. "sdpa": bool [B, 1, T, S], or None when nothing is hidden but the future.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    if masks not in ALL_MASK_ATTENTION_FUNCTIONS:
        raise KvcalError(f"attention implementation {masks!r} has no mask function: load the model with sdpa or eager")
    name = f"{PREFIX}{next(_numbers)}"
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[masks])
    try:
        with closing(Route(model, lambda before: name).open()):
            yield
    finally:  # transformers offers no way to unregister
        AttentionInterface._global_mapping.pop(name, None)
        AttentionMaskInterface._global_mapping.pop(name, None)


def backbone(model: Any) -> Any:
    """The decoder without its language-model head: no logits are needed there, and they are large."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    # transformers guesses by the attribute's name; ModernBERT's decoder is its output projection.
    return decoder if hasattr(decoder, "get_input_embeddings") else model.base_model


def kind(model: Any) -> str:
    """How errors name a model's architecture."""
    return f"{type(model).__name__} (model type {model.config.get_text_config().model_type})"


def watch(model: Any, tokens: int, see: Callable[..., object], cache: Any = None) -> None:
    """One forward pass, with see(module, query, key, value, mask, kwargs) before every attention call.

    Args:
        cache: the pass goes on from it; None: a pass without one.
    """
    from .attending import WATCHES, attached_name

    # Dropout in training mode draws random numbers: only then is their state restored, as other threads draw, too.
    draws = any(module.training for module in model.modules())
    gpus = [model.device] if model.device.type == "cuda" else []
    thread = threading.get_ident()
    given = {"use_cache": False} if cache is None else {"use_cache": True, "past_key_values": cache}
    with torch.no_grad(), torch.random.fork_rng(gpus, enabled=draws), closing(Route(model, attached_name).open()):
        WATCHES[thread] = see
        try:
            backbone(model)(input_ids=first_ids(model, tokens), **given)
        finally:
            del WATCHES[thread]


def first_ids(model: Any, tokens: int) -> Tensor:
    """[1, tokens] int64, the first ids of its vocabulary: every model has them."""
    # Offloaded weights are on no device until they are used; accelerate then brings the ids to them.
    return torch.arange(tokens, device="cpu" if model.device.type == "meta" else model.device).unsqueeze(0)
