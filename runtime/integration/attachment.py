"""What is attached to a model while it is compressed or has compressed caches: our attention, and pre-hooks."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from ...artifacts import KvcalError
from ..attention import Logits, attention
from .layer import Call, CompressedLayer
from .routing import Route, backbone, find_attention


@dataclass
class Attachment:
    """A model with our attention and hooks, shared by the context and all caches of that model."""

    route: Route
    hooks: list[Any]
    forget: Callable[[], object]
    users: int = 0
    begin: Callable[[], Any] | None = None
    """Makes an empty cache for calls that would begin one; None: the model is not compressed, only its caches are."""

    def release(self) -> None:
        with _LOCK:
            self.users -= 1
            if self.users == 0:
                self.forget()
                self.route.close()
                for hook in self.hooks:
                    hook.remove()


_ATTACHED: weakref.WeakKeyDictionary[Any, Attachment] = weakref.WeakKeyDictionary()
_LOCK = threading.RLock()  # reentrant: a dropped cache may be collected, and release, at any point


def attached(model: Any) -> Attachment | None:
    return _ATTACHED.get(model)


def attach(model: Any) -> Attachment:
    with _LOCK:
        found = _ATTACHED.get(model)
        if found is None:
            find_attention(model)  # refuses what does not go through the attention interface
            owner = weakref.ref(model)
            route = Route(model, _attention, masks="sdpa")
            # The backbone too: it may be called by itself.
            parts = {id(part): part for part in (model, backbone(model))}.values()
            hooks = [part.register_forward_pre_hook(_before(owner), with_kwargs=True) for part in parts]
            found = _ATTACHED[model] = Attachment(route, hooks, lambda: _forget(owner()))
        found.users += 1
        return found


def _forget(model: Any) -> None:
    if model is not None:  # a cache may outlive its model, whose entry went with it
        _ATTACHED.pop(model, None)


def _before(owner: weakref.ref[Any]) -> Callable[..., Any]:
    """A pre-hook that gives our cache to calls that would begin an empty one."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        model: Any = owner()
        given = {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}
        past, keep = given.get("past_key_values"), given.get("logits_to_keep")
        guesses = keep - 1 if type(keep) is int and keep > 0 else None
        call = getattr(past, "call", None)
        if isinstance(call, Call):
            if call.model() is not model:
                raise KvcalError("past_key_values is a compressed cache of another model: make one for this model")
            if module is model:
                call.drafts = guesses if call.speculates else None
            return None
        begin, wanted = _ATTACHED[model].begin, given.get("use_cache")
        if begin is None or not (model.config.use_cache if wanted is None else wanted):
            return None
        if model.training and torch.is_grad_enabled():  # a training step, whose cache nobody reads
            return None
        if past is not None and (type(past) is not DynamicCache or past.get_seq_length()):
            raise KvcalError(
                f"inside compress() past_key_values is a {type(past).__name__} of {past.get_seq_length()} tokens: "
                "begin with an empty cache, or with a CompressedCache, and leave cache_implementation out"
            )
        cache = begin()
        # Assisted decoding had told the cache that we replace to record, and asks for the logits of its guesses.
        if past is not None and (guesses or any(getattr(layer, "record_past", False) for layer in past.layers)):
            cache.activate_past_recording()
            cache.call.drafts = guesses
        return (), {**given, "past_key_values": cache, "use_cache": True}

    return hook


class _WithoutGradient(torch.autograd.Function):
    """The first argument, with a backward pass that says that there is none, where it would leave attention out."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, query: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise KvcalError("no gradients flow through a compressed cache: call the model with use_cache=False")


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention of a routed model: a compressed layer's, or dense over what it is given."""
    if kwargs.get("position_bias") is not None:
        raise KvcalError(f"{type(module).__name__}: attention with a position bias is not supported")
    logits = Logits(query.shape[-1] ** -0.5 if scaling is None else float(scaling), softcap, s_aux)
    layer: CompressedLayer | None = getattr(key, "kvcal_layer", None)
    if layer is not None:
        out = layer.attend(query, mask, logits)
        if torch.is_grad_enabled() and query.requires_grad:
            out = _WithoutGradient.apply(out, query)
    else:
        causal = mask is None and query.shape[2] > 1
        out = attention(query, key, value, logits, mask, causal=causal)
    return out.transpose(1, 2).contiguous(), None
