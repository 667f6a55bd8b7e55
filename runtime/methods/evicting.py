"""Policies that hold a budget of tokens and evict the others, in each KV head by itself.

A token lies in a slot, and `POSITION` says which token that is. A new one takes a free slot, or that of the token of
least worth.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention import Logits
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
        """Raises KvcalError unless a cache may hold the tokens at these positions [B, Hkv, slots], the first `held` of
        each sequence, in order."""

    def most_held(self, length: int, evicted: int, waits: bool) -> int:
        """How many tokens a sequence may hold that has `length`.

        Args:
            evicted: tokens that it has lost before.
            waits: whether tokens have come by prefill since its last decoded one.
        """
        return self.budget.of(length)

    def least_held(self, length: int) -> int:
        """How many tokens a sequence of `length` holds at least: one less than its budget where there was made room
        for the next."""
        return self.budget.of(length + 1) - 1

    def step(self, query: Tensor, cache: LayerCache, logits: Logits) -> Attended:
        return Attended(attend_all(query, *self.keys_values(cache), cache.metadata, logits), None)

    def held_metadata(self, tokens: DecodeMetadata, evicted: Evicted) -> DecodeMetadata:
        """Metadata of what is held of sequences that `tokens` tells of, where each has what its budget allows.

        Args:
            evicted: when the host last saw to it.
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
        """That any sequence takes on its way to so many tokens.

        Args:
            evicted: as of `held_metadata`.
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
        """[B, Hkv] int64: where the last token of each sequence goes; [B, Hkv, 1] bool: whether another lies there."""
        metadata = cache.metadata
        assert metadata.whole is not None
        lengths, kept = (of.seq_lens.view(-1, 1, 1) for of in (metadata.whole, metadata))
        free = cache.tokens(POSITION).squeeze(-1) < 0
        worth = self.worth(cache, lengths, kept).masked_fill(free, -torch.inf)
        if (valid := metadata.valid()) is not None:
            worth = worth.masked_fill(~valid.unsqueeze(1), torch.inf)
        slot = worth.argmin(-1)
        return slot, ~free.gather(2, slot.unsqueeze(2))

    def on_evict(self, cache: LayerCache, slot: Tensor, gone: Tensor) -> None:
        """Tokens leave: those in slots [B, Hkv, m] int64, in ascending order of position, as far as `gone` [B, Hkv, m]
        bool says so."""

    def dense_bytes(self, reading: Reading) -> int:
        """Keys, values and all that says which token goes next."""
        of = sum(reading.widths[name] for name in ("key", "value", POSITION))
        return reading.tokens() * reading.heads * of


class ByAge(EvictingPolicy):
    """The first tokens and the most recent ones stay."""

    name = "streaming"

    def __init__(self, budget: Budget, sinks: int):
        super().__init__(budget)
        self.sinks = sinks

    def worth(self, cache: LayerCache, lengths: Tensor, kept: Tensor, last: LastQueries | None = None) -> Tensor:
        position = cache.tokens(POSITION).squeeze(-1).float()
        # One place of the budget is the new token's.
        return position.masked_fill(position < (kept - 1).clamp_max(self.sinks), torch.inf)

    def check_held(self, saved: Saved, position: Tensor, held: Sequence[int]) -> None:
        for row, (length, count) in enumerate(zip(saved.lengths, held, strict=True)):
            own = position[row, :, :count]
            first = (own == torch.arange(count)).sum(-1, keepdim=True)
            recent = own == torch.arange(length - count, length)
            kept = recent | (torch.arange(count) < first)
            require("position", kept & (recent | (own < self.sinks)), "the first tokens and the most recent ones")
