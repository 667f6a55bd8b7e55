"""The step of a policy: what runs eagerly, over buffers that stand still and with lengths that the device counts."""

from __future__ import annotations

from torch import Tensor

from ..attention import Logits
from ..kv.pages import PAGE, DecodeMetadata, LayerCache, contiguous_table
from ..stores.paged import PagedStore
from .step import Step


class PagedStep(Step):
    store: PagedStore
    _table: Tensor | None = None

    def write(self, key: Tensor, value: Tensor) -> None:
        cache, policy = self.cache(), self.store.policy
        new = policy.encode(key.unsqueeze(2), value.unsqueeze(2))
        if policy.sums:
            cache.add_last(policy.add_up(new))
        cache.write_last(new)
        if cache.summaries and cache.metadata.may_fill(every := policy.summarise_every):
            cache.summarise_last(policy.summarised, policy.summarise, every)

    def due(self, tokens: int) -> bool:
        index = self.store.index
        return index is not None and index.due([length + tokens for length in self.store.lengths])

    def settle(self, tokens: int) -> None:
        super().settle(tokens)
        self.store.lengths_changed()

    def addresses(self) -> tuple[tuple[int, int], ...]:
        tensors = [rows.tensor for rows in self.store.summaries.values() if rows.tensor is not None]
        tensors += [] if self.store.index is None else self.store.index.tensors().values()
        return (*super().addresses(), *((tensor.data_ptr(), tensor.shape[2]) for tensor in tensors))

    def changed(self) -> list[Tensor]:
        return list(self.store.sums.values())

    def read(self, query: Tensor, logits: Logits) -> Tensor:
        return self.store.policy.step(query, self.cache(), logits).output

    def cache(self) -> LayerCache:
        place = ("metadata", self.capacity, self.buffer("key").shape[2])
        return self.store.cache_at(self.clock.once(place, self._metadata))

    def reserve(self, capacity: int) -> None:
        self.capacity, index = capacity, self.store.index
        if index is not None:
            index.build(self.store.lengths, [True] * len(self.store.lengths), self.store.rows)
            index.reserve(capacity, self.store.lengths)
        self.store.reserve(capacity)
        pages = self.buffer("key").shape[2] // PAGE
        if self._table is None or self._table.shape[1] != pages:  # a captured step has its address
            self._table = contiguous_table(len(self.clock.seen), pages, self.clock.seen.device)

    def _metadata(self) -> DecodeMetadata:
        assert self._table is not None
        shortest, longest = self.clock.told or (0, self.capacity)
        # Of a step that is replayed the host knows no lengths.
        lengths = (longest,) * len(self._table) if shortest == longest else None
        return DecodeMetadata(self._table, self.clock.seen, longest, shortest, contiguous=True, lengths=lengths)

    @property
    def per_token(self) -> tuple[str, ...]:
        return tuple(self.store.rows)
