"""What it costs a layer to read another layer's keys and values: the error of its attention output on the sample.

The layer's sampled queries attend over the sampled tokens, once with its own keys and values and once with those of
the storing layer in their place, causally: a query sees the tokens whose position is at most its own. Its own block
has too few sampled tokens (N · seq_len / tokens of them, 64 by default), so those of all blocks count: they stand for
one context of N tokens, in which the positions of queries and keys are those that a model meets.

This approximates what sharing does to a model in four ways: the context is a sample; one query per KV head and token
stands for its group; soft-capping and sink logits of the model are left out; and the layer sees the hidden states
of the original model, while in a shared one they already carry what layers below have lost.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ELEMENTS = 1 << 24
"""Scores held at once: 64 MB as float32, and twice that for their softmax."""


class ReadingLayer:
    """A layer's queries and its own attention output, with which its output on other keys and values is compared.

    One measurement is O(Hkv Q N (D + Dv)) and holds at most 2²⁴ scores; with 1024 queries, 4096 tokens, 8 KV heads
    and head dim 128 that is 17 GFLOP.
    """

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, position: Tensor, scaling: float, queries: int = 1024
    ):
        """
        Args:
            query, key, value: [Hkv, N, D] or [Hkv, N, Dv], of the same tokens.
            position: [N] int64, each token's position in its block.
            queries: at most so many, evenly spread over the positions.
        """
        self._order = position.argsort(stable=True)
        sorted_position = position[self._order]
        chosen = torch.linspace(0, len(position) - 1, min(queries, len(position))).round().long()
        # Keys in order of position: a query sees the first `visible` of them.
        self._visible = torch.searchsorted(sorted_position, sorted_position[chosen], right=True)
        self._query = query[:, self._order[chosen]].float() * scaling
        self._own = self._attend(key, value)

    @property
    def output_square(self) -> float:
        """‖o‖² of its own output, over all queries and heads."""
        return float(self._own.square().sum())

    def error(self, key: Tensor, value: Tensor) -> float:
        """‖o' - o‖ / ‖o‖ over all queries and heads together, o' with these keys and values instead of its own."""
        found = self._attend(key, value)
        norm = self._own.square().sum()
        difference = (found - self._own).square().sum()
        return float((difference / norm).sqrt()) if norm > 0 else float(difference > 0)

    def received(self, key: Tensor) -> Tensor:
        """[N]: the attention that each token receives from the queries, summed over them and the KV heads."""
        key = key[:, self._order].float()
        block = max(1, _ELEMENTS // (key.shape[0] * key.shape[1]))
        total = torch.zeros(key.shape[1])
        for start in range(0, len(self._visible), block):
            weights = self._weights(key, start, start + block)
            total[: weights.shape[-1]] += weights.sum((0, 1))
        return torch.empty_like(total).scatter_(0, self._order, total)

    def _attend(self, key: Tensor, value: Tensor) -> Tensor:
        """[Hkv, Q, Dv] in double precision, block by block of queries."""
        key, value = key[:, self._order].float(), value[:, self._order].float()
        heads, tokens = key.shape[:2]
        block = max(1, _ELEMENTS // (heads * tokens))
        outputs = []
        for start in range(0, len(self._visible), block):
            weights = self._weights(key, start, start + block)
            outputs.append((weights @ value[:, : weights.shape[-1]]).double())
        return torch.cat(outputs, 1)

    def _weights(self, key: Tensor, start: int, end: int) -> Tensor:
        """[Hkv, q, seen]: the softmax of these queries over the keys that they see, in order of position."""
        visible = self._visible[start:end]
        seen = int(visible[-1])
        scores = self._query[:, start:end] @ key[:, :seen].mT
        scores.masked_fill_(torch.arange(seen) >= visible.unsqueeze(1), float("-inf"))
        return scores.softmax(-1)
