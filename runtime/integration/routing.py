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
from .masks import needed_only

# Not "…sdpa…" nor "…flash…": transformers takes other branches for names that contain those.
PREFIX = "kvcal_"
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
        build = ALL_MASK_ATTENTION_FUNCTIONS[masks]
        AttentionMaskInterface.register(self.name, needed_only(build) if masks == "sdpa" else build)
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
    original = implementation(model)

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        see(module, query, key, value)
        return delegate(original, module)(module, query, key, value, *args, **kwargs)

    # Offloaded weights are on no device until they are used; accelerate then brings the ids to them.
    ids = torch.arange(tokens, device="cpu" if model.device.type == "meta" else model.device).unsqueeze(0)
    gpus = [model.device] if model.device.type == "cuda" else []
    # A model in training mode would draw dropout.
    with torch.no_grad(), torch.random.fork_rng(gpus), closing(Route(model, attention, masks=original)):
        backbone(model)(input_ids=ids, use_cache=False)


def delegate(implementation: str, module: nn.Module) -> Callable[..., Any]:
    """The function that computes `module`'s attention under an implementation's name."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get(implementation, eager)
