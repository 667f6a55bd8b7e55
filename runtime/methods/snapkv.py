"""SnapKV (Li et al., 2024): keeps the tokens of a prompt that its last queries attend to, and all decoded tokens.

The last `window` queries observe: the attention that a token receives from them, pooled over its neighbours, is its
worth (their listing 1). The window itself stays. Evicted per KV head: the attention of the query heads that share it is
added up. Nothing is evicted while decoding; after another prompt its last queries choose again among the tokens held,
those decoded included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...artifacts import Artifact, KvcalError
from ..kv.last_queries import LastQueries
from ..kv.pages import POSITION, DecodeMetadata, LayerCache
from ..kv.saved import Saved
from .amounts import Budget, check_choice, check_count
from .base import Method, Policy, Reading
from .evicting import Evicted, EvictingPolicy

MORE = float(1 << 22)
"""Larger than any attention received: the window's tokens outrank all others, later ones first, since a small budget
has no room for all of them."""


@dataclass(frozen=True)
class SnapKV(Budget, Method):
    """`keep` applies to the tokens that there are when the first one after a prompt is decoded."""

    keeps_all_tokens = False
    query_aware = True
    window: int = 32
    """Last tokens of a prompt, which stay, and whose queries observe the others."""
    kernel: int = 5
    """Neighbouring tokens whose attention is pooled; odd."""
    pooling: str = "avg"
    """"avg" or "max" of them."""

    def bind(self, layer: int, head_dim: int, artifact: Artifact | None) -> SnapKVPolicy:
        self.check()
        check_count("window", self.window, 1)
        check_count("kernel", self.kernel, 1)
        if self.kernel % 2 == 0:
            raise KvcalError(f"kernel {self.kernel}: give an odd number, as many neighbours on either side")
        check_choice("pooling", self.pooling, ("avg", "max"))
        return SnapKVPolicy(self)


class SnapKVPolicy(EvictingPolicy):
    name = "snapkv"
    replaces = False

    def __init__(self, settings: SnapKV):
        super().__init__(settings)
        self.settings, self.observes = settings, settings.window

    def most_held(self, length: int, evicted: int, waits: bool) -> int:
        """What the budget allows of a prompt, and all decoded tokens."""
        return self.budget.of(length - 1) + 1 if waits else length - evicted

    def least_held(self, length: int) -> int:
        return 1

    def worth(self, cache: LayerCache, lengths: Tensor, kept: Tensor, last: LastQueries | None = None) -> Tensor:
        assert last is not None
        position = cache.tokens(POSITION).squeeze(-1)
        window = position >= lengths - 1 - self.settings.window
        received = last.received(cache.tokens("key"), position).masked_fill(window, 0)
        order = position.argsort(-1)
        received = torch.empty_like(received).scatter_(2, order, self._pooled(received.gather(2, order)))
        return torch.where(window, MORE + position, received)

    def _pooled(self, received: Tensor) -> Tensor:
        """[B, Hkv, S] -> the same, over neighbours in S."""
        pool = F.avg_pool1d if self.settings.pooling == "avg" else F.max_pool1d
        return pool(received, self.settings.kernel, stride=1, padding=self.settings.kernel // 2)

    def held_metadata(self, tokens: DecodeMetadata, evicted: Evicted) -> DecodeMetadata:
        """All tokens of each sequence but those evicted after its prompts."""
        gone = evicted.host

        def reckon() -> DecodeMetadata:
            seq_lens = tokens.seq_lens - evicted.device
            shortest = max(0, tokens.shortest - max(gone))
            longest = self.most_slots(tokens.longest, evicted)
            return DecodeMetadata(tokens.block_table, seq_lens, longest, shortest, contiguous=True, whole=tokens)

        return tokens.once(("snapkv", gone), reckon)

    def most_slots(self, tokens: int, evicted: Evicted) -> int:
        return tokens - min(evicted.host)

    def _slot(self, cache: LayerCache) -> tuple[Tensor, Tensor]:
        """After all tokens held."""
        slot = (cache.metadata.seq_lens.long() - 1).unsqueeze(1).expand(-1, cache.heads)
        return slot, torch.zeros_like(slot, dtype=torch.bool).unsqueeze(2)

    def check_held(self, saved: Saved, position: Tensor, held: Sequence[int]) -> None:
        """Nothing to check: the queries that chose among the tokens are not kept."""

    def dense_bytes(self, reading: Reading) -> int:
        """Keys and values alone: a new token goes to the end, so no positions are read."""
        return Policy.dense_bytes(self, reading)
