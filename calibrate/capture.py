"""See every layer's queries, keys and values, before and after the rotary embedding, in one forward pass.

The model's attention calls are routed through our function by transformers' own attention registry;
it hands what it sees to an observer and then delegates to the implementation the model had, with the
mask that implementation expects. No forward is overridden and logits stay bit-identical.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..artifacts import KvcalError
from ..artifacts.errors import one_line
from ..runtime.integration.implementations import delegate, implementation, is_routed
from ..runtime.integration.routing import UNSUPPORTED, backbone, first_ids, kind, routed
from ..runtime.wrapped import unwrapped
from .pre_rotary import PreRotary, find_rotation, replay_without_rotation


@dataclass(frozen=True)
class LayerTensors:
    """What one attention layer computed for one batch."""

    layer: int
    query_post: Tensor
    """[B, Hq, T, D]."""
    key_post: Tensor
    """[B, Hkv, T, D], not repeated for GQA."""
    value: Tensor
    """[B, Hkv, T, Dv]."""
    query_pre: Tensor
    """[B, Hq, T, D]; equal to `query_post` in layers without a rotary embedding."""
    key_pre: Tensor
    """[B, Hkv, T, D]."""
    scaling: float
    window: int | None
    softcap: float | None = None
    sink_logits: Tensor | None = None
    """[Hq], of gpt-oss."""


@contextmanager
def capture(
    model: Any,
    observe: Callable[[LayerTensors], None],
    pre_rotary: PreRotary | None = None,
) -> Iterator[PreRotary]:
    """Call `observe` for every attention layer of every whole-sequence forward pass inside the context.

    Args:
        model: a transformers model, or a module around one, whose attention goes through the attention interface.
        pre_rotary: what an earlier context learned about undoing the rotation; a new one otherwise.

    Raises:
        KvcalError: the model cannot be captured, by name of the architecture; or a pass continues a cache, whose
            keys were not seen before their rotation.
    """
    from ..runtime.integration.support import find_attention  # loads transformers

    model = unwrapped(model)
    attention_modules = find_attention(model)
    has_rotary = bool(getattr(model.config.get_text_config(), "rope_parameters", None))
    recorder = _Recorder()
    pre_rotary = pre_rotary or PreRotary()
    embeddings: dict[int, tuple[Tensor, Tensor] | None] = {}
    replayed: dict[int, tuple[Tensor, Tensor]] = {}

    thread = threading.get_ident()

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() != thread:
            return
        layer: int = module.layer_idx  # type: ignore[assignment]
        call = inspect.signature(module.forward).bind(*args, **kwargs)
        rotation = embeddings[layer] = find_rotation(module, call, has_rotary)
        if rotation is not None and pre_rotary.needs_replay(layer):
            replayed[layer] = recorder.record(lambda: replay_without_rotation(module, call))

    def on_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> None:
        layer: int = module.layer_idx  # type: ignore[assignment]
        if key.shape[2] != query.shape[2]:
            raise KvcalError(
                f"layer {layer}: {key.shape[2]} keys for {query.shape[2]} queries: "
                "capture whole sequences, not decoding"
            )
        query_pre, key_pre = pre_rotary.resolve(
            layer, query, key, embeddings.pop(layer, None), replayed.pop(layer, None)
        )
        scaling = kwargs.get("scaling")
        observe(
            LayerTensors(
                layer=layer,
                query_post=query,
                key_post=key,
                value=value,
                query_pre=query_pre,
                key_pre=key_pre,
                scaling=float(scaling) if scaling is not None else query.shape[-1] ** -0.5,
                window=kwargs.get("sliding_window"),
                softcap=kwargs.get("softcap"),
                sink_logits=kwargs.get("s_aux"),
            )
        )

    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in attention_modules]
    try:
        with _routed(model, on_attention, recorder, attention_modules):
            yield pre_rotary
    finally:
        for handle in handles:
            handle.remove()


def check_capture(model: Any) -> None:
    """Runs a model on two tokens. Raises KvcalError, by name of the architecture, where it cannot be captured."""
    with torch.no_grad(), capture(model, lambda seen: None):
        try:
            backbone(model)(input_ids=first_ids(model, 2), use_cache=False)
        except (KvcalError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of an attention module that cannot be called a second time, whatever it is
            raise KvcalError(
                f"{kind(model)}: its attention cannot be run again without the rotary embedding "
                f"({one_line(str(error))[:300]}): {UNSUPPORTED}"
            ) from error


class _Recorded(Exception):
    def __init__(self, query: Tensor, key: Tensor):
        self.query, self.key = query, key


class _Recorder:
    """While it records, the next attention call of its model ends by raising what it was given."""

    active = False

    def record(self, call: Callable[[], Any]) -> tuple[Tensor, Tensor]:
        self.active = True
        try:
            call()
        except _Recorded as seen:
            return seen.query, seen.key
        finally:
            self.active = False
        raise KvcalError("an attention module did not reach the attention interface when replayed: not supported")


@contextmanager
def _routed(
    model: Any, on_attention: Callable[..., None], recorder: _Recorder, seen: Sequence[nn.Module]
) -> Iterator[None]:
    """Send the attention calls of `model`, and only of it, through `on_attention`, then to where they went before."""
    if is_routed(model):
        raise KvcalError("this model is already being captured or compressed: leave the other context first")
    original, thread, modules = implementation(model), threading.get_ident(), set(seen)

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,  # some models give it by this name
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        # Other threads' calls, and those of other models with the same config, are no part of the pass.
        if threading.get_ident() == thread and module in modules:
            if recorder.active:
                raise _Recorded(query, key)
            on_attention(module, query, key, value, kwargs)
        return delegate(original, module)(module, query, key, value, attention_mask, *args, **kwargs)

    with routed(model, attention, masks=original):
        yield
