"""H2O (Zhang et al., 2023): the tokens that have received most attention, and the most recent ones, half and half.

Evicted per KV head: the attention of the query heads that share it is added up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...artifacts import Artifact
from ..attention import SoftmaxSpec, weighted
from ..kv.last_queries import LastQueries
from ..kv.pages import POSITION, RECEIVED, LayerCache
from ..kv.saved import Saved, require
from .amounts import Budget
from .base import Attended, Method, Reading
from .evicting import EvictingPolicy
from .full import weights


@dataclass(frozen=True)
class H2O(Budget, Method):
    """Half of what is kept for recent tokens, the rest for heavy hitters."""

    keeps_all_tokens = False

    def bind(self, layer: int, head_dim: int, artifact: Artifact | None) -> H2OPolicy:
        self.check()
        return H2OPolicy(self)


class H2OPolicy(EvictingPolicy):
    name = "h2o"
    accumulates = True

    def worth(self, cache: LayerCache, lengths: Tensor, kept: Tensor, last: LastQueries | None = None) -> Tensor:
        recent = cache.tokens(POSITION).squeeze(-1) >= lengths - kept // 2
        return cache.tokens(RECEIVED).squeeze(-1).masked_fill(recent, torch.inf)

    def step(self, query: Tensor, cache: LayerCache, spec: SoftmaxSpec) -> Attended:
        key, value = self.keys_values(cache)
        shares = weights(query, key, cache.metadata, spec)
        return Attended(weighted(shares, value).to(query.dtype), None, shares.sum((2, 3)))

    def check_held(self, saved: Saved, position: Tensor, held: Sequence[int]) -> None:
        """Only the recent half of the budget can be checked: the others depend on the attention of past steps."""
        saved.take_received()
        for sequence, (length, count) in enumerate(zip(saved.lengths, held, strict=True)):
            recent = max(0, min(count, self.budget.of(length + 1) // 2 - 1))
            wanted = torch.arange(length - recent, length)
            require("position", position[sequence, :, count - recent : count] == wanted, "the most recent tokens")

    def dense_bytes(self, reading: Reading) -> int:
        return super().dense_bytes(reading) + reading.tokens() * reading.heads * reading.widths[RECEIVED]
