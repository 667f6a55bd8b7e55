"""Send the attention calls of one transformers model through a function of ours, and back again.

transformers looks its attention function up by the name in the config; no forward is overridden.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from contextlib import closing
from typing import Any

import torch
from torch import Tensor, nn

from ...artifacts import KvcalError

# Not "…sdpa…" nor "…flash…": transformers takes other branches for names that contain those.
PREFIX = "kvcal_"
UNSUPPORTED = "this architecture is not supported (docs/architectures.md lists those that are)"
_numbers = itertools.count()


class Route:
    """From its making until `close()`, every attention call of `model` is a call of `attention`.

    Args:
        attention: called as transformers calls one: (module, query [B, Hq, T, D], key, value, mask, **kwargs) ->
            (output [B, T, Hq, Dv], weights or None).
        masks: whose masks it gets, e.g. "sdpa": bool [B, 1, T, S], or None when nothing is hidden but the future.
    """

    def __init__(self, model: Any, attention: Callable[..., Any], masks: str):
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

        if masks not in ALL_MASK_ATTENTION_FUNCTIONS:
            raise KvcalError(
                f"attention implementation {masks!r} has no mask function: load the model with sdpa or eager"
            )
        submodels = [module for module in model.modules() if hasattr(module, "set_attn_implementation")]
        self._configs = {id(part.config): part.config for part in submodels}
        self._before = {key: config._attn_implementation for key, config in self._configs.items()}
        self.name = f"{PREFIX}{next(_numbers)}"  # its own, so that routes of several models do not meet
        AttentionInterface.register(self.name, attention)
        # Without a mask function under the same name the mask is silently None.
        AttentionMaskInterface.register(self.name, ALL_MASK_ATTENTION_FUNCTIONS[masks])
        for config in self._configs.values():
            config._attn_implementation_internal = self.name

    def close(self) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface

        for key, config in self._configs.items():
            config._attn_implementation_internal = self._before[key]
        # transformers offers no way to unregister
        AttentionInterface._global_mapping.pop(self.name, None)
        AttentionMaskInterface._global_mapping.pop(self.name, None)


def implementation(model: Any) -> str:
    """The attention implementation that the model's config names now."""
    return model.config.get_text_config()._attn_implementation or "eager"


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
    original = implementation(model)

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,  # some models give it by this name
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        see(module, query, key, value, attention_mask, kwargs)
        return delegate(original, module)(module, query, key, value, attention_mask, *args, **kwargs)

    gpus = [model.device] if model.device.type == "cuda" else []
    # A model in training mode would draw dropout.
    with torch.no_grad(), torch.random.fork_rng(gpus), closing(Route(model, attention, masks=original)):
        given = {"use_cache": False} if cache is None else {"use_cache": True, "past_key_values": cache}
        backbone(model)(input_ids=first_ids(model, tokens), **given)


def first_ids(model: Any, tokens: int) -> Tensor:
    """[1, tokens] int64, the first ids of its vocabulary: every model has them."""
    # Offloaded weights are on no device until they are used; accelerate then brings the ids to them.
    return torch.arange(tokens, device="cpu" if model.device.type == "meta" else model.device).unsqueeze(0)


def delegate(implementation: str, module: nn.Module) -> Callable[..., Any]:
    """The function that computes `module`'s attention under an implementation's name."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get(implementation, eager)
