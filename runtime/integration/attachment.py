"""What is attached to a model while it is compressed or has compressed caches: our attention, and pre-hooks."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...artifacts import KvcalError
from ..attention import Logits, attention
from .layer import Call, CompressedLayer
from .routing import Route, backbone
from .support import attention_layers

if TYPE_CHECKING:
    from .sharing import Sharing


@dataclass
class Attachment:
    """A model with our attention and hooks, shared by the context and all caches of that model."""

    route: Route
    hooks: list[Any]
    forget: Callable[[], object]
    users: int = 0
    begin: Callable[[], Any] | None = None
    """Makes an empty cache for calls that would begin one; None: the model is not compressed, only its caches are."""
    sharing: Sharing | None = None
    """What the method `cla` did to the model, for as long as it is compressed."""

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
            attention_layers(model)  # refuses what cannot be attached to
            owner = weakref.ref(model)
            route = Route(model, _attention, masks="sdpa")
            # The backbone too: it may be called by itself.
            parts = weakref.WeakSet((model, backbone(model)))
            hooks = [part.register_forward_pre_hook(_before(owner, parts), with_kwargs=True) for part in parts]
            found = _ATTACHED[model] = Attachment(route, hooks, lambda: _forget(owner()))
        found.users += 1
        return found


def _forget(model: Any) -> None:
    if model is not None:  # a cache may outlive its model, whose entry went with it
        _ATTACHED.pop(model, None)


def _before(owner: weakref.ref[Any], parts: weakref.WeakSet[nn.Module]) -> Callable[..., Any]:
    """A pre-hook that gives our cache to calls that would begin an empty one."""

    @torch.compiler.disable
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        model: Any = owner()
        if module not in parts:
            raise KvcalError("this model was copied while it was compressed or had compressed caches: copy it before")
        given = {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}
        past = given.get("past_key_values")
        if isinstance(getattr(past, "call", None), Call):
            _continue(model, module, given)
            return None
        found, wanted = _ATTACHED.get(model), given.get("use_cache")
        if found is None:  # the last cache was collected as this call began
            return None
        begin = found.begin
        uses = getattr(model.config.get_text_config(), "use_cache", True) if wanted is None else wanted
        # A training step makes a cache that nobody reads.
        if begin is None or not uses or (model.training and torch.is_grad_enabled()):
            return None
        return (), {**given, "past_key_values": _begin(begin, given), "use_cache": True}

    return hook


def _continue(model: Any, module: nn.Module, given: Mapping[str, Any]) -> None:
    """A call with a cache of ours."""
    past = given["past_key_values"]
    if past.call.model() is not model:
        raise KvcalError("past_key_values is a compressed cache of another model: make one for this model")
    past.check_sharing(model)
    past.check_whole()
    if module is model:
        past.call.expect(*_lengths(given))


def _begin(begin: Callable[[], Any], given: Mapping[str, Any]) -> Any:
    """A cache for a call that has none, or an empty one of transformers'."""
    past = given.get("past_key_values")
    if past is not None and (type(past) is not DynamicCache or past.offloading or past.get_seq_length()):
        length = f" of {past.get_seq_length()} tokens" if isinstance(past, Cache) else ""
        raise KvcalError(
            f"inside compress() past_key_values is a {type(past).__name__}{length}: begin with an empty cache, or "
            "with a CompressedCache, and leave cache_implementation out"
        )
    cache = begin()
    # Assisted decoding had told the cache that we replace to record, and asks for the logits of its guesses.
    tokens, logits = _lengths(given)
    if past is not None and ((logits or 1) > 1 or any(getattr(layer, "record_past", False) for layer in past.layers)):
        cache.activate_past_recording()
        cache.call.expect(tokens, logits)
    return cache


def _lengths(given: Mapping[str, Any]) -> tuple[int, int | None]:
    """(new tokens of a call, of how many it wants logits; None: all)."""
    inputs = given.get("input_ids")
    inputs = given.get("inputs_embeds") if inputs is None else inputs
    logits = given.get("logits_to_keep")
    return 0 if inputs is None else inputs.shape[1], logits if type(logits) is int and logits > 0 else None


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
    attention_mask: Tensor | None = None,  # by this name: some models give it so
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention of a routed model: a compressed layer's, or dense over what it is given."""
    logits = Logits(query.shape[-1] ** -0.5 if scaling is None else float(scaling), softcap, s_aux)
    layer: CompressedLayer | None = getattr(key, "kvcal_layer", None)
    if layer is not None:
        out = layer.attend(query, attention_mask, logits)
        if torch.is_grad_enabled() and query.requires_grad:
            out = _WithoutGradient.apply(out, query)
    elif logits.plain:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    else:
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        causal = causal and attention_mask is None and query.shape[2] > 1
        out = attention(query, key, value, logits, attention_mask, causal=causal)
    return out.transpose(1, 2).contiguous(), None
