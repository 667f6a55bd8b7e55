"""Attention over given keys and values in plain torch: the definition that every store and kernel is held to.

Shapes: query [B, Hq, T, D]; key [B, H, S, D] and value [B, H, S, Dv], where each of the H heads serves
Hq / H consecutive query heads and is never repeated in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

QUERY_BLOCK = 128
"""Queries at a time where a mask or probabilities of [T, S] would otherwise be materialised: few enough for the
caches of a CPU, where 128 take two thirds of the time of 512."""


@dataclass(frozen=True)
class SoftmaxSpec:
    """How q·k becomes the logits of the softmax in one attention layer."""

    scaling: float
    softcap: float | None = None
    """Gemma 2: softcap · tanh(logit / softcap)."""
    sink_logits: Tensor | None = None
    """[Hq], gpt-oss: one more logit per head, of a token whose value is zero."""

    @property
    def plain(self) -> bool:
        return self.softcap is None and self.sink_logits is None

    def logits(self, dots: Tensor) -> Tensor:
        """float32 logits of q·k."""
        logits = dots.float() * self.scaling
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def softmax(self, logits: Tensor) -> Tensor:
        """Over the last dimension of [B, H, G, …, S]; zeros where every logit is -inf."""
        if self.sink_logits is not None:
            sink_logits = self.sink_logits.float().view(1, *logits.shape[1:3], *[1] * (logits.dim() - 3))
            logits = torch.cat((logits, sink_logits.expand(*logits.shape[:-1], 1)), -1)
        weights = logits.softmax(-1).nan_to_num(0.0)
        return weights if self.sink_logits is None else weights[..., :-1]


def attention(
    query: Tensor, key: Tensor, value: Tensor, spec: SoftmaxSpec, visible: Tensor | None = None, causal: bool = False
) -> Tensor:
    """softmax(q·k) v.

    Args:
        visible: bool, broadcastable to [B, H, T, S]; None = every key.
        causal: T == S, and query i sees keys up to i; excludes `visible`.

    Returns:
        [B, Hq, T, Dv]; zeros for a query that sees nothing.
    """
    batch, heads, tokens, _ = query.shape
    group = heads // key.shape[1]
    if not spec.plain:
        return _explicit(query, key, value, spec, visible, causal)
    if tokens == 1:  # the group's queries become the rows of one product
        packed = query.reshape(batch, key.shape[1], group, -1)
        out = F.scaled_dot_product_attention(packed, key, value, attn_mask=visible, scale=spec.scaling)
        return out.reshape(batch, heads, 1, -1)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=visible, is_causal=causal, scale=spec.scaling, enable_gqa=group > 1
    )


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, spec: SoftmaxSpec, limits: Tensor | None = None
) -> Tensor:
    """Attention of T queries to what each of them may see.

    Args:
        limits: [B, T] int64, query i of a sequence sees its first `limits` keys; None: T == S, plainly causal.
    """
    if limits is None and spec.plain:
        return attention(query, key, value, spec, causal=query.shape[2] > 1)
    blocks = [
        attention(query[:, :, block], key[:, :, :end], value[:, :, :end], spec, visible.unsqueeze(1))
        for block, end, visible in _blocks(query, key, limits)
    ]
    return torch.cat(blocks, 2)


def attention_mass(query: Tensor, key: Tensor, spec: SoftmaxSpec, limits: Tensor | None = None) -> Tensor:
    """[B, H, S] float32: what each key receives of the softmax of all T queries, summed over the group's heads.

    Args:
        limits: as of `causal_attention`.
    """
    mass = torch.zeros(key.shape[:3], dtype=torch.float32, device=key.device)
    for block, end, visible in _blocks(query, key, limits):
        weights = probabilities(query[:, :, block], key[:, :, :end], spec, visible.unsqueeze(1))
        mass[:, :, :end] += weights.sum((2, 3))
    return mass


def probabilities(query: Tensor, key: Tensor, spec: SoftmaxSpec, visible: Tensor | None = None) -> Tensor:
    """[B, H, G, T, S] float32 attention weights; `visible` as in `attention`."""
    group = query.shape[1] // key.shape[1]
    packed = query.unflatten(1, (key.shape[1], group)).flatten(2, 3)  # the group's queries: rows of one product
    scores = spec.logits(packed.float() @ key.float().mT).unflatten(2, (group, -1))
    if visible is not None:
        scores.masked_fill_(~visible.unsqueeze(2), -torch.inf)
    return spec.softmax(scores)


def weighted(weights: Tensor, value: Tensor) -> Tensor:
    """[B, Hq, T, Dv] float32: sums of `value` [B, H, S, Dv], weighted by `probabilities` [B, H, G, T, S]."""
    return (weights.flatten(2, 3) @ value.float()).unflatten(2, weights.shape[2:4]).flatten(1, 2)


def _blocks(query: Tensor, key: Tensor, limits: Tensor | None) -> Iterator[tuple[slice, int, Tensor]]:
    """(queries, how many keys the last of them may see, [B, T', S'] which they see), a block at a time."""
    tokens, total = query.shape[2], key.shape[2]
    if limits is None:
        limits = torch.arange(total - tokens + 1, total + 1, device=key.device).unsqueeze(0)
    for start in range(0, tokens, QUERY_BLOCK):
        block = slice(start, start + QUERY_BLOCK)
        seen = limits[:, block]
        end = max(1, int(seen.max()))
        yield block, end, torch.arange(end, device=key.device) < seen.unsqueeze(-1)


def _explicit(
    query: Tensor, key: Tensor, value: Tensor, spec: SoftmaxSpec, visible: Tensor | None, causal: bool
) -> Tensor:
    if causal:
        square = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=key.device)
        visible = square.tril()[None, None]
    weights = probabilities(query, key, spec, visible)
    return weighted(weights, value).to(query.dtype)
