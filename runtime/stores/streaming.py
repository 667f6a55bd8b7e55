"""StreamingLLM (Xiao et al., 2023): the first tokens and the most recent ones.

Keys keep the rotary positions of the text; the paper renumbers them within the cache, which matters
only beyond the model's trained length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...artifacts import Artifact
from ..attention import Logits, attention
from ..kv.saved import Saved, require
from ..methods.amounts import Budget, check_count
from .evicting import EvictingStore


@dataclass(frozen=True)
class Streaming(Budget):
    sinks: int = 4
    """First tokens that stay; they are part of what is kept."""

    def build(self, layer: int, head_dim: int, artifact: Artifact | None) -> Callable[[], StreamingStore]:
        self.check()
        check_count("sinks", self.sinks)
        return lambda: StreamingStore(self)


class StreamingStore(EvictingStore):
    budget: Streaming

    def __init__(self, settings: Streaming):
        super().__init__("streaming", settings)

    def _worth(self, lengths: Tensor, budgets: Tensor) -> Tensor:
        position = self.rows["position"].view.squeeze(-1).float()
        # One place of the budget is the new token's.
        return position.masked_fill(position < (budgets - 1).clamp_max(self.budget.sinks), float("inf"))

    def _check_held(self, saved: Saved, position: Tensor, held: list[int]) -> None:
        """Some of the first tokens, and the most recent ones."""
        for row, (length, count) in enumerate(zip(saved.lengths, held, strict=True)):
            own = position[row, :, :count]
            first = (own == torch.arange(count)).sum(-1, keepdim=True)
            recent = own == torch.arange(length - count, length)
            kept = recent | (torch.arange(count) < first)
            require(
                "position", kept & (recent | (own < self.budget.sinks)), "the first tokens and the most recent ones"
            )

    def attend(self, query: Tensor, logits: Logits) -> Tensor:
        key, value = self.rows["key"].view, self.rows["value"].view
        self._read = key.nbytes + value.nbytes + self.rows["position"].view.nbytes
        return attention(query, key, value, logits, self._held())
