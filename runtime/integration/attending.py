"""The attention of models that are attached: a compressed layer's, or the model's own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...artifacts import KvcalError
from ..attention import SoftmaxSpec, attention
from .implementations import PREFIX, delegate, stood_for
from .masks import needed_only

WATCHES: dict[int, Callable[..., object]] = {}
"""By thread, what is called with (module, query, key, value, mask, kwargs) before every attention call."""


class _WithoutGradient(torch.autograd.Function):
    """Returns its first argument; its backward pass raises, as gradients would silently leave attention out."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, query: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise KvcalError("no gradients flow through a compressed cache: call the model with use_cache=False")


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,  # some models give it by this name
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    eager: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """As transformers calls it: [B, Hq, T, D] and a bool mask [B, 1, T, S] or None -> ([B, T, Hq, Dv], weights)."""
    mask = attention_mask
    if WATCHES:
        _tell(module, query, key, value, mask, {**kwargs, "softcap": softcap, "s_aux": s_aux})
    if kwargs.get("position_bias") is not None:
        raise KvcalError(f"{type(module).__name__}: attention with a position bias is not supported")
    layer = getattr(key, "kvcal_layer", None)
    spec = SoftmaxSpec(query.shape[-1] ** -0.5 if scaling is None else float(scaling), softcap, s_aux)
    if layer is not None:
        out = layer.attend(query, mask, spec)
        if torch.is_grad_enabled() and query.requires_grad:
            out = _WithoutGradient.apply(out, query)
        return out.transpose(1, 2).contiguous(), None
    settings = {"dropout": dropout, "scaling": scaling, **kwargs}
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 4):
        # A call that began before the model was attached has the mask of the model's own implementation.
        return _own(module)(module, query, key, value, mask, softcap=softcap, s_aux=s_aux, **settings)
    if eager and (function := delegate("eager", module)) is not None:
        special = {name: given for name, given in (("softcap", softcap), ("s_aux", s_aux)) if given is not None}
        added = _added(mask, query, key, _is_causal(module, kwargs))
        out, weights = function(module, query, key, value, added, **special, **settings)
        return out, weights
    if spec.plain:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **settings)
    causal = _is_causal(module, kwargs) and mask is None and query.shape[2] > 1
    return attention(query, key, value, spec, mask, causal=causal).transpose(1, 2).contiguous(), None


@torch.compiler.disable
def _own(module: Any) -> Any:
    return delegate(stood_for(module.config._attn_implementation) or "eager", module)


@torch.compiler.disable
def _tell(*call: Any) -> None:
    if (see := WATCHES.get(threading.get_ident())) is not None:
        see(*call)


def _is_causal(module: nn.Module, settings: dict[str, Any]) -> bool:
    given = settings.get("is_causal")
    return bool(getattr(module, "is_causal", True) if given is None else given)


def _added(mask: Tensor | None, query: Tensor, key: Tensor, causal: bool) -> Tensor | None:
    """What eager attention adds to its logits, for the mask that SDPA would have been given."""
    tokens, total = query.shape[2], key.shape[2]
    if mask is None and tokens > 1 and causal:
        mask = torch.ones(1, 1, tokens, total, dtype=torch.bool, device=query.device).tril(total - tokens)
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros((), dtype=query.dtype, device=query.device).masked_fill(~mask, torch.finfo(query.dtype).min)


def attend_eagerly(*call: Any, **settings: Any) -> tuple[Tensor, Tensor | None]:
    """`attend`, for models whose own attention is eager."""
    return attend(*call, **settings, eager=True)


def attached_name(before: str) -> str:
    """The name of our implementation, for models whose own is `before`."""
    return f"{PREFIX}attached_eager" if before == "eager" else f"{PREFIX}attached"


for _before, _function in (("eager", attend_eagerly), ("sdpa", attend)):
    AttentionInterface.register(attached_name(_before), _function)
    # Without a mask function under the same name the mask is silently None.
    AttentionMaskInterface.register(attached_name(_before), needed_only(ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]))
