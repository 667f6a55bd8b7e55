"""A transformers model's parts: its decoder, and its attention modules, found by watching a forward pass."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import torch
from torch import nn

from ...artifacts import KvcalError
from .implementations import PREFIX, Route, refuse_captured

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
    return decoder if isinstance(decoder, nn.Module) else model.base_model


def kind(model: Any) -> str:
    """How errors name a model's architecture."""
    return f"{type(model).__name__} (model type {model.config.get_text_config().model_type})"


def refuse_unsupported(model: Any) -> None:
    """Raises KvcalError for what the config alone rules out."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise KvcalError(f"{kind(model)}: encoder-decoder models are not supported, only decoders are")
    if getattr(model.config.get_text_config(), "num_kv_shared_layers", 0):
        raise KvcalError(f"{kind(model)}: its layers already share keys and values, which is not supported")


def find_attention(model: Any) -> list[nn.Module]:
    """The attention module of each layer, in order, found by watching a forward pass over two tokens.

    Raises:
        KvcalError: some layer does not go through the attention interface, or layers share their KV.
    """
    refuse_unsupported(model)
    refuse_captured(model)
    config = model.config.get_text_config()
    seen: dict[int, nn.Module] = {}
    watch(model, 2, lambda module, *tensors: seen.update({module.layer_idx: module}))
    missing = sorted(set(range(config.num_hidden_layers)) - set(seen))
    if missing:
        raise KvcalError(
            f"{kind(model)}: layers {missing} do not use transformers' attention interface: "
            "this architecture is not supported"
        )
    return [seen[layer] for layer in sorted(seen)]


def watch(model: Any, tokens: int, see: Callable[..., object]) -> None:
    """One forward pass without a cache, with see(module, query, key, value) before every attention call."""
    from .attending import WATCHES, attached_name

    # Offloaded weights are on no device until they are used; accelerate then brings the ids to them.
    ids = torch.arange(tokens, device="cpu" if model.device.type == "meta" else model.device).unsqueeze(0)
    gpus = [model.device] if model.device.type == "cuda" else []
    # A model in training mode would draw dropout; else other threads' random numbers are left alone.
    draws = any(module.training for module in model.modules())
    thread = threading.get_ident()
    with torch.no_grad(), torch.random.fork_rng(gpus, enabled=draws), closing(Route(model, attached_name).open()):
        WATCHES[thread] = see
        try:
            backbone(model)(input_ids=ids, use_cache=False)
        finally:
            del WATCHES[thread]
