"""Policies that hold a budget of tokens and evict the others, each KV head its own.

A token lies in a slot, and `POSITION` says which token that is. A new one takes a free slot, or that of the token of
least worth.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention import SoftmaxSpec
from ..kv.last_queries import LastQueries
from ..kv.pages import POSITION, DecodeMetadata, LayerCache
from ..kv.saved import Saved, require
from .amounts import Budget
from .base import Attended, Policy, Reading
from .budgets import budgets
from .full import attend_all


@dataclass(frozen=True)
class Evicted:
    """How many tokens each sequence has lost."""

    host: tuple[int, ...]
    device: Tensor
    """[B] int32"""


class EvictingPolicy(Policy):
    """Nothing is evicted before the first decoded token, so that a prompt prefilled in chunks, or over several calls,
    is attended densely and leaves the same cache as one prefilled at once."""

    name: str
    """The method's, for messages."""
    replaces = True
    """Whether a new token takes another's slot where the budget is full."""

    def __init__(self, budget: Budget):
        self.budget = budget

    @abstractmethod
    def worth(self, cache: LayerCache, lengths: Tensor, kept: Tensor, last: LastQueries | None = None) -> Tensor:
        """[B, Hkv, slots] float: what the token in a slot is worth once its sequence has one more.

        The lowest is evicted first, +inf never.

        Args:
            lengths: [B, 1, 1], tokens of each sequence, the new one included.
            kept: [B, 1, 1], tokens that are held then, the new one included.
            last: queries of the prompt, where the policy observes them.
        """

    @abstractmethod
    def check_held(self, saved: Saved, position: Tensor, held: Sequence[int]) -> None:
        """Raises KvcalError unless a cache can have come to hold these tokens.

        Args:
            position: [B, Hkv, slots], of which each sequence has its first `held`, in ascending order.
        """

    def most_held(self, length: int, evicted: int, waits: bool) -> int:
        """How many tokens a sequence of `length` may hold.

        Args:
            evicted: tokens that the sequence has lost before.
            waits: whether tokens have come by prefill since the sequence's last decoded token.
        """
        return self.budget.of(length)

    def least_held(self, length: int) -> int:
        """How many tokens a sequence of `length` holds at least: one less than its budget once room was
        made for the next."""
        return self.budget.of(length + 1) - 1

    def step(self, query: Tensor, cache: LayerCache, spec: SoftmaxSpec) -> Attended:
        return Attended(attend_all(self, query, cache, spec), None)

    def held_metadata(self, tokens: DecodeMetadata, evicted: Evicted) -> DecodeMetadata:
        """Metadata of the tokens held, where each sequence holds what its budget allows.

        Args:
            tokens: metadata of all tokens, the evicted ones included.
            evicted: as of the store's last `reserve`.
        """

        def reckon() -> DecodeMetadata:
            longest, shortest = self.most_slots(tokens.longest, evicted), 0
            if tokens.shortest == tokens.longest:
                longest = shortest = self.budget.of(tokens.longest)
            seq_lens = budgets(self.budget, tokens.seq_lens)
            return DecodeMetadata(tokens.block_table, seq_lens, longest, shortest, contiguous=True, whole=tokens)

        # A count of 1 equals a fraction of 1.0.
        return tokens.once((self.budget, type(self.budget.keep)), reckon)

    def most_slots(self, tokens: int, evicted: Evicted) -> int:
        """The most slots that any sequence takes until it has so many tokens.

        Args:
            evicted: as in `held_metadata`.
        """
        return self.budget.most(tokens)

    def write(self, cache: LayerCache, new: Mapping[str, Tensor]) -> None:
        metadata, key = cache.metadata, new["key"]
        assert metadata.whole is not None
        slot, taken = self._slot(cache)
        self.on_evict(cache, slot.unsqueeze(2), taken)
        position = (metadata.whole.seq_lens - 1).view(-1, 1, 1, 1).expand(-1, key.shape[1], 1, 1)
        cache.write_at({**new, POSITION: position}, slot)

    def _slot(self, cache: LayerCache) -> tuple[Tensor, Tensor]:
        """[B, Hkv] int64: the slot for the last token of a sequence; [B, Hkv, 1] bool: whether another lies there."""
        metadata = cache.metadata
        assert metadata.whole is not None
        lengths, kept = (counted.seq_lens.view(-1, 1, 1) for counted in (metadata.whole, metadata))
        free = cache.tokens(POSITION).squeeze(-1) < 0
        worth = self.worth(cache, lengths, kept).masked_fill(free, -torch.inf)
        if (valid := metadata.valid()) is not None:
            worth = worth.masked_fill(~valid.unsqueeze(1), torch.inf)
        slot = worth.argmin(-1)
        return slot, ~free.gather(2, slot.unsqueeze(2))

    def on_evict(self, cache: LayerCache, slot: Tensor, gone: Tensor) -> None:
        """Called before tokens are evicted: those in slots [B, Hkv, m] int64, in ascending order of position, where
        `gone` [B, Hkv, m] bool is True."""

    def dense_bytes(self, reading: Reading) -> int:
        """Keys and values, and the positions by which the next token to evict is found."""
        width = sum(reading.widths[name] for name in ("key", "value", POSITION))
        return reading.tokens() * reading.heads * width


class ByAge(EvictingPolicy):
    """The first tokens and the most recent ones stay."""

    name = "streaming"

    def __init__(self, budget: Budget, sinks: int):
        super().__init__(budget)
        self.sinks = sinks

    def worth(self, cache: LayerCache, lengths: Tensor, kept: Tensor, last: LastQueries | None = None) -> Tensor:
        position = cache.tokens(POSITION).squeeze(-1).float()
        # One slot of the budget is the new token's.
        return position.masked_fill(position < (kept - 1).clamp_max(self.sinks), torch.inf)

    def check_held(self, saved: Saved, position: Tensor, held: Sequence[int]) -> None:
        for sequence, (length, count) in enumerate(zip(saved.lengths, held, strict=True)):
            positions = position[sequence, :, :count]
            first = (positions == torch.arange(count)).sum(-1, keepdim=True)
            recent = positions == torch.arange(length - count, length)
            kept = recent | (torch.arange(count) < first)
            require("position", kept & (recent | (positions < self.sinks)), "the first tokens and the most recent ones")
