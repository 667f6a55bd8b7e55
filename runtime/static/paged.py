"""The step of a policy at fixed shapes and addresses: what runs eagerly, over buffers that stand still and with lengths
that the device counts."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention import Logits
from ..kv.pages import PAGE, DecodeMetadata, LayerCache, contiguous_table
from ..stores.paged import PagedStore
from .clock import Clock


class PagedStep:
    """Every row gets one token per step; nothing that it does waits for the device or depends on values there.

    The store's lengths on the host stand still meanwhile, until `settle`.
    """

    def __init__(self, store: PagedStore, clock: Clock):
        self.store, self.clock = store, clock
        self.capacity = 0
        self._table: Tensor | None = None

    def step(self, query: Tensor, key: Tensor, value: Tensor, logits: Logits) -> Tensor:
        """[B, Hq, 1, D], [B, Hkv, 1, D], [B, Hkv, 1, Dv] -> [B, Hq, 1, Dv]."""
        self.write(key[:, :, 0], value[:, :, 0])
        return self.read(query, logits)

    def write(self, key: Tensor, value: Tensor) -> None:
        """The new tokens [B, Hkv, D | Dv], each to the end of its row."""
        cache, policy = self.cache(), self.store.policy
        new = policy.encode(key.unsqueeze(2), value.unsqueeze(2))
        if policy.sums:
            cache.add_last(policy.add_up(new))
        cache.write_last(new)
        if cache.summaries and cache.metadata.may_fill(every := policy.summarise_every):
            cache.summarise_last(policy.summarised, policy.summarise, every)

    def read(self, query: Tensor, logits: Logits) -> Tensor:
        """[B, Hq, 1, D] -> [B, Hq, 1, Dv], after `write`: all that a layer does that reads another's store."""
        return self.store.policy.step(query, self.cache(), logits).output

    def cache(self) -> LayerCache:
        place = ("metadata", self.capacity, self.buffer("key").shape[2])
        return self.store.cache_at(self.clock.once(place, self._metadata))

    def _metadata(self) -> DecodeMetadata:
        assert self._table is not None
        shortest, longest = self.clock.told or (0, self.capacity)
        # Of a step that is replayed the host knows no lengths.
        lengths = (longest,) * len(self._table) if shortest == longest else None
        return DecodeMetadata(self._table, self.clock.seen, longest, shortest, contiguous=True, lengths=lengths)

    def reserve(self, capacity: int) -> None:
        """Make room for rows of `capacity` tokens, and see to what is due. Addresses may change."""
        self.capacity, index = capacity, self.store.index
        if index is not None:
            index.build(self.store.lengths, [True] * len(self.store.lengths), self.store.rows)
            index.reserve(capacity, self.store.lengths)
        self.store.reserve(capacity)
        pages = self.buffer("key").shape[2] // PAGE
        if self._table is None or self._table.shape[1] != pages:  # a captured step has its address
            self._table = contiguous_table(len(self.clock.seen), pages, self.clock.seen.device)

    def due(self, tokens: int) -> bool:
        """Whether the host has to see to the store before the next token, `tokens` after `settle`."""
        index = self.store.index
        return index is not None and index.due([length + tokens for length in self.store.lengths])

    def settle(self, tokens: int) -> None:
        """Tell the store of so many decoded tokens per row."""
        store = self.store
        store.lengths = [length + tokens for length in store.lengths]
        store.seen += tokens
        if store.valid is not None:
            store.valid = torch.cat((store.valid, store.valid.new_ones(store.valid.shape[0], tokens)), 1)
        store.lengths_changed()

    @property
    def per_token(self) -> tuple[str, ...]:
        """The store's tensors that have an entry per token."""
        return tuple(self.store.rows)

    def changed(self) -> list[Tensor]:
        """What a step changes but the slots of the coming token."""
        return list(self.store.sums.values())

    def buffer(self, name: str) -> Tensor:
        """[B, Hkv, capacity, …], to the end of its capacity."""
        tensor = self.store.rows[name].tensor
        assert tensor is not None
        return tensor

    def addresses(self) -> tuple[tuple[int, int], ...]:
        """(address, capacity) of everything that a step reads or writes: a graph captured with others is void."""
        buffers = (*self.store.rows.values(), *self.store.summaries.values())
        tensors = [buffer.tensor for buffer in buffers if buffer.tensor is not None]
        tensors += [] if self.store.index is None else self.store.index.tensors().values()
        return tuple((tensor.data_ptr(), tensor.shape[2]) for tensor in tensors)
