"""The step of a policy at fixed shapes and addresses, which a CUDA graph can replay: what runs eagerly, over buffers
that stand still and with lengths that the device counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .attention import SoftmaxSpec
from .kv.pages import PAGE, DecodeMetadata, LayerCache, OncePerStep, contiguous_table
from .store import Store


class Clock(OncePerStep):
    """How many tokens each sequence has, on the device: one for all layers. The host counts steps by itself."""

    def __init__(self, lengths: Sequence[int], device: torch.device):
        self.lengths = torch.tensor(list(lengths), dtype=torch.int32, device=device) + 1
        """[B] tokens, the coming one included."""
        self.told: tuple[int, int] | None = None
        """The fewest and the most of `lengths`; None while steps may be replays of a graph."""
        self._reckoned = {}

    def tick(self) -> None:
        self.lengths.add_(1)
        self.reset()

    def reset(self) -> None:
        """Forget what was reckoned for this step."""
        self._reckoned.clear()


class FixedStep:
    """Every sequence gets one token per step; nothing that it does waits for the device or depends on values there.

    The store's lengths on the host stand still meanwhile, until it is told to `count`.
    """

    def __init__(self, store: Store, clock: Clock):
        self.store, self.clock = store, clock
        self.capacity = 0
        """Tokens that a sequence may grow to."""
        self._table: Tensor | None = None

    def step(self, query: Tensor, key: Tensor, value: Tensor, spec: SoftmaxSpec) -> Tensor:
        """[B, Hq, 1, D], [B, Hkv, 1, D], [B, Hkv, 1, Dv] -> [B, Hq, 1, Dv]."""
        self.write(key, value)
        return self.read(query, spec)

    def write(self, key: Tensor, value: Tensor) -> None:
        """The new tokens [B, Hkv, 1, D | Dv], each to the end of its sequence."""
        self.store.write_last(self.cache(), key, value)

    def read(self, query: Tensor, spec: SoftmaxSpec) -> Tensor:
        """[B, Hq, 1, D] -> [B, Hq, 1, Dv], after `write`: all that a layer does that reads another's store."""
        cache = self.cache()
        found = self.store.policy.step(query, cache, spec)
        if found.received is not None and self.store.accumulates:
            cache.receive(found.received)
        return found.output

    def cache(self) -> LayerCache:
        place = ("metadata", self.capacity, None if self._table is None else self._table.shape)
        return self.store.cache_at(self.store.held_metadata(self.clock.once(place, self._metadata)))

    def _metadata(self) -> DecodeMetadata:
        assert self._table is not None
        shortest, longest = self.clock.told or (0, self.capacity)
        # Of a step that is replayed the host knows no lengths.
        lengths = (longest,) * len(self._table) if shortest == longest else None
        return DecodeMetadata(
            self._table, self.clock.lengths, longest, shortest, contiguous=True, lengths=lengths,
            replayed=self.clock.told is None,
        )  # fmt: skip

    def reserve(self, capacity: int) -> None:
        """Make room for sequences of `capacity` tokens, and do what is `due`. Addresses may change."""
        self.capacity = capacity
        self.store.reserve(capacity)
        pages = self.buffer("key").shape[2] // PAGE
        if self._table is None or self._table.shape[1] != pages:  # a captured step has its address
            self._table = contiguous_table(len(self.clock.lengths), pages, self.clock.lengths.device)

    def buffer(self, name: str) -> Tensor:
        """[B, Hkv, capacity, …], to the end of its capacity."""
        tensor = self.store.tokens[name].tensor
        assert tensor is not None
        return tensor
