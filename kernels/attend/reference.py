"""The definition in plain torch: attention over chosen tokens, its parts, and their merge. Signatures: `__init__.py`.

Sums are taken in float32, or in float64 for float64 operands.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .shapes import Partial


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    count: Tensor,
    *,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    extra: Sequence[Partial],
) -> Tensor:
    valid = torch.arange(index.shape[-1], device=index.device) < count.unsqueeze(-1)
    part = chosen(query, key, value, index, valid, scaling, softcap)
    return merge([part, *extra], sinks, query.dtype)


def attend_runs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    sizes: Tensor,
    count: Tensor | None,
    *,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    extra: Sequence[Partial],
) -> Tensor:
    token = torch.arange(key.shape[2], device=key.device)
    if count is not None:
        sizes = sizes.where(torch.arange(sizes.shape[-1], device=sizes.device) < count.unsqueeze(-1), 0)
    first, size = starts.unsqueeze(-1), sizes.unsqueeze(-1)
    valid = ((token >= first) & (token < first + size)).any(-2)
    part = chosen(query, key, value, token.expand(valid.shape), valid, scaling, softcap)
    return merge([part, *extra], sinks, query.dtype)


def window(
    query: Tensor, key: Tensor, value: Tensor, begin: Tensor, end: Tensor, *, scaling: float, softcap: float | None
) -> Partial:
    token = torch.arange(key.shape[2], device=key.device)
    valid = (token >= begin.view(-1, 1, 1, 1)) & (token < end.view(-1, 1, 1, 1))
    return partial(query, key.unsqueeze(2), value.unsqueeze(2), valid, scaling, softcap)


def tail(
    query: Tensor, mean_key: Tensor, mean_value: Tensor, unread: Tensor, *, scaling: float, softcap: float | None
) -> Partial:
    unread = unread if unread.dim() == 4 else unread.unsqueeze(2)
    there = unread > 0
    weight = unread.where(there, 1).log()
    return partial(query, mean_key.unsqueeze(2), mean_value.unsqueeze(2), there, scaling, softcap, weight)


def unread(index: Tensor, count: Tensor, owner: Tensor, sizes: Tensor, begin: Tensor, end: Tensor) -> Tensor:
    flat = index.flatten(2)
    read = (torch.arange(index.shape[-1], device=index.device) < count.unsqueeze(-1)).flatten(2)
    read = read & (flat >= begin.view(-1, 1, 1)) & (flat < end.view(-1, 1, 1))
    # The owner of a slot that is in no cluster may be anything.
    cluster = owner.gather(2, flat.where(read, 0).long()).where(read, 0).long().view_as(index)
    left = sizes.float() if index.dim() == 3 else sizes.float().unsqueeze(2).expand(*index.shape[:3], -1)
    return left.scatter_add(-1, cluster, -read.view_as(index).float())


def chosen(
    query: Tensor, key: Tensor, value: Tensor, index: Tensor, valid: Tensor, scaling: float, softcap: float | None
) -> Partial:
    """Over the tokens `index` [B, Hkv(, G), K] where they are `valid`."""
    if index.dim() == 3:
        index, valid = index.unsqueeze(2), valid.unsqueeze(2)
    batch = torch.arange(key.shape[0], device=key.device).view(-1, 1, 1, 1)
    head = torch.arange(key.shape[1], device=key.device).view(1, -1, 1, 1)
    index = index.masked_fill(~valid, 0).long()
    return partial(query, key[batch, head, index], value[batch, head, index], valid, scaling, softcap)


def partial(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor,
    scaling: float,
    softcap: float | None,
    weight: Tensor | None = None,
) -> Partial:
    """Over given tokens: key [B, Hkv, 1 or G, K, D], value, valid and the logits' addend `weight` likewise; n = 1."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    # What is not there may be anything, NaN included, and 0 · NaN is NaN.
    key, value = (tensor.masked_fill(~valid.unsqueeze(-1), 0).to(dtype) for tensor in (key, value))
    logits = (key @ query.to(dtype).unsqueeze(-1)).squeeze(-1) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = (logits if weight is None else logits + weight).masked_fill(~valid, -torch.inf)
    lse = logits.logsumexp(-1, keepdim=True)
    return _shares(logits, lse).unsqueeze(-2) @ value, lse


def merge(partials: Sequence[Partial], sinks: Tensor | None, dtype: torch.dtype) -> Tensor:
    out = torch.cat([part for part, _ in partials], -2)
    lse = torch.cat([part for _, part in partials], -1)
    mass = lse.logsumexp(-1, keepdim=True)
    if sinks is not None:
        mass = torch.logaddexp(mass, sinks.view(1, *lse.shape[1:3], 1).to(lse.dtype))
    out = out.masked_fill((lse == -torch.inf).unsqueeze(-1), 0)
    return (_shares(lse, mass).unsqueeze(-2) @ out).squeeze(-2).to(dtype)


def _shares(logits: Tensor, mass: Tensor) -> Tensor:
    """e^(logits - mass), zeros where there is no mass at all."""
    return (logits - mass.clamp_min(torch.finfo(mass.dtype).min)).exp()
