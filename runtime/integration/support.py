"""Which models can be calibrated and decoded from a compressed cache: found out by watching them decode three tokens.

A compressed cache can compute a layer's attention when the layer hands the very keys and values that it gave its cache
to transformers' attention function, once a pass, with the usual mask. A model that does otherwise is refused before
anything else is run, by what is seen of it and not by its name.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_utils import PreTrainedModel

from ...artifacts import KvcalError
from ...artifacts.errors import one_line
from .implementations import refuse_captured
from .routing import UNSUPPORTED, kind, watch

BIASES = ("position_bias", "alibi")
"""Tensors that are added to the logits, by the names under which attention functions are given them."""


@dataclass(frozen=True)
class AttentionLayer:
    """One layer's attention as it was seen."""

    module: nn.Module
    head_dim: int
    """Of keys; values may differ."""


@dataclass(frozen=True)
class _Call:
    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    kwargs: Mapping[str, Any]


_FOUND: weakref.WeakKeyDictionary[Any, list[AttentionLayer]] = weakref.WeakKeyDictionary()


def find_attention(model: Any) -> list[nn.Module]:
    """The attention module of each layer, in order.

    Raises:
        KvcalError: as `attention_layers`.
    """
    return [layer.module for layer in attention_layers(model)]


def attention_layers(model: Any) -> list[AttentionLayer]:
    """Each layer's attention, in order; watched once per model.

    Raises:
        KvcalError: a layer keeps, computes or hides something that a compressed cache does not.
    """
    refuse_unsupported(model)
    refuse_captured(model)
    layers = _FOUND.get(model)
    if layers is None or not {layer.module for layer in layers} <= set(model.modules()):
        layers = _FOUND[model] = watched(model)
    return layers


def refuse_unsupported(model: Any) -> None:
    """Raises KvcalError for what the config alone rules out."""
    config = model.config.get_text_config()
    if getattr(model.config, "is_encoder_decoder", False):
        raise KvcalError(f"{kind(model)}: encoder-decoder models are not supported, only decoders are")
    if getattr(config, "num_kv_shared_layers", 0):
        raise KvcalError(f"{kind(model)}: its layers already share keys and values, which is not supported")


def takes_positions(model: Any) -> bool:
    """Whether positions are an argument of the model's forward; else it counts what its cache holds."""
    # A wrapper's forward takes anything and hands it on.
    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), model)
    return "position_ids" in inspect.signature(inner.forward).parameters


def watched(model: Any) -> list[AttentionLayer]:
    """As `attention_layers`, whether or not it was watched before: a prompt of two tokens and a step."""
    cache = _cache(model)
    calls: list[_Call] = []
    with _evaluating(model):
        for tokens in (2, 1):
            calls.clear()
            try:
                watch(model, tokens, lambda *seen: calls.append(_Call(*seen)), cache)
            except (KvcalError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # of a model that cannot be called like this, whatever it is
                raise KvcalError(
                    f"{kind(model)}: it cannot decode with a cache from token ids alone "
                    f"({one_line(str(error))[:300]}): {UNSUPPORTED}"
                ) from error
            by_layer = _by_layer(model, calls, len(cache.layers))
            for layer_idx, call in enumerate(by_layer):
                if why := _refusal(call, layer_idx if isinstance(cache.layers[layer_idx], _SeenLayer) else None):
                    raise KvcalError(
                        f"{kind(model)}: layer {layer_idx} ({type(call.module).__name__}) {why}: {UNSUPPORTED}"
                    )
    return [AttentionLayer(call.module, call.key.shape[-1]) for call in by_layer]


class _SeenLayer(DynamicLayer):
    """Marks the keys and values that it returns."""

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        key, value = super().update(key_states, value_states, *args, **kwargs)
        key, value = key.view_as(key), value.view_as(value)
        key.kvcal_seen = value.kvcal_seen = self.layer_idx
        return key, value


def _cache(model: Any) -> DynamicCache:
    """Raises KvcalError: a layer keeps something else than keys and values."""
    try:
        cache = DynamicCache(config=model.config)
    except Exception as error:  # configs that state no layers in the usual way
        raise KvcalError(
            f"{kind(model)}: transformers makes no cache for it ({one_line(str(error))[:300]}): {UNSUPPORTED}"
        ) from error
    unknown = [
        idx for idx, layer in enumerate(cache.layers) if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer)
    ]
    if unknown:
        keeps = type(cache.layers[unknown[0]]).__name__
        raise KvcalError(
            f"{kind(model)}: layers {unknown} keep other state than keys and values ({keeps}): {UNSUPPORTED}"
        )
    cache.layers = [_SeenLayer(idx) if type(layer) is DynamicLayer else layer for idx, layer in enumerate(cache.layers)]
    return cache


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout and gradient checkpointing, which takes the cache away."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _by_layer(model: Any, calls: list[_Call], layers: int) -> list[_Call]:
    indices = [getattr(call.module, "layer_idx", None) for call in calls]
    if missing := sorted(set(range(layers)) - set(indices)):
        raise KvcalError(f"{kind(model)}: layers {missing} do not use transformers' attention interface: {UNSUPPORTED}")
    for layer_idx in range(layers):
        if indices.count(layer_idx) > 1:
            name = type(calls[indices.index(layer_idx)].module).__name__
            raise KvcalError(
                f"{kind(model)}: layer {layer_idx} ({name}) calls its attention {indices.count(layer_idx)} times a "
                f"pass: {UNSUPPORTED}"
            )
    return [calls[indices.index(layer_idx)] for layer_idx in range(layers)]


def _refusal(call: _Call, cached: int | None) -> str | None:
    """What a compressed cache would get wrong in a call; None: nothing.

    Args:
        cached: the call's layer, if its keys and values are marked; None: a sliding window.
    """
    query, key, value, mask = call.query, call.key, call.value, call.mask
    if cached is not None and {getattr(tensor, "kvcal_seen", None) for tensor in (key, value)} != {cached}:
        return "attends to other keys and values than it puts into its cache"
    if query.shape[1] % key.shape[1] or query.shape[-1] != key.shape[-1] or key.shape[:3] != value.shape[:3]:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in (query, key, value))
        return f"has queries, keys and values of shapes {shapes}"
    if bias := next((name for name in BIASES if call.kwargs.get(name) is not None), None):
        return f"adds a {bias.replace('_', ' ')} to its logits"
    tokens, total = query.shape[2], key.shape[2]
    if mask is not None:
        visible = mask if mask.dtype == torch.bool else mask == 0
        causal = torch.ones(tokens, total, dtype=torch.bool, device=mask.device).tril(total - tokens)
        if mask.shape[-3] != 1 or not torch.equal(visible, causal.expand_as(visible)):
            return "hides more or less than the future"
    elif tokens > 1 and call.kwargs.get("is_causal", getattr(call.module, "is_causal", True)) is False:
        return "sees the future"
    return None
