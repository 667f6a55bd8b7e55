"""The definition in plain torch. Signatures: `__init__.py`.

Sums are taken in float32, or in float64 for float64 operands.
"""

import torch
from torch import Tensor

from ..pages import PAGE


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    count: Tensor,
    *,
    scaling: float,
    softcap: float | None,
    sink_logits: Tensor | None,
    table: Tensor | None,
) -> Tensor:
    valid = torch.arange(index.shape[-1], device=index.device) < count.unsqueeze(-1)
    if index.dim() == 3:
        index, valid = index.unsqueeze(2), valid.unsqueeze(2)
    place = torch.arange(query.shape[0], device=key.device).view(-1, 1, 1, 1)
    head = torch.arange(key.shape[1], device=key.device).view(1, -1, 1, 1)
    index = index.masked_fill(~valid, 0).long()
    if table is not None:
        place, index = table[place, index // PAGE].masked_fill(~valid, 0).long(), index % PAGE
    return softmax(query, key[place, head, index], value[place, head, index], valid, scaling, softcap, sink_logits)


def softmax(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor,
    scaling: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> Tensor:
    """Attention to given tokens: key [B, Hkv, 1 or G, K, D], value and `valid` likewise."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    # Tokens that are not valid may hold anything, NaN included, and 0 · NaN is NaN.
    key, value = (tensor.masked_fill(~valid.unsqueeze(-1), 0).to(dtype) for tensor in (key, value))
    logits = (key @ query.to(dtype).unsqueeze(-1)).squeeze(-1) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~valid, -torch.inf)
    lse = logits.logsumexp(-1, keepdim=True)
    out = (_shares(logits, lse).unsqueeze(-2) @ value).squeeze(-2)
    if sink_logits is not None:
        out = out * _shares(lse, torch.logaddexp(lse, sink_logits.view(1, *lse.shape[1:3], 1).to(dtype)))
    return out.to(query.dtype)


def _shares(logits: Tensor, mass: Tensor) -> Tensor:
    """e^(logits - mass), zeros where there is no mass at all."""
    return (logits - mass.clamp_min(torch.finfo(mass.dtype).min)).exp()
