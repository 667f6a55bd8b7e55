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
        self.cache().write_last(self.store.encoded(key.unsqueeze(2), value.unsqueeze(2)))

    def read(self, query: Tensor, logits: Logits) -> Tensor:
        return self.store.policy.step(query, self.cache(), logits).output

    def cache(self) -> LayerCache:
        place = ("metadata", self.capacity, self.buffer("key").shape[2])
        return LayerCache(self.store.pages(), self.clock.once(place, self._metadata))

    def reserve(self, capacity: int) -> None:
        super().reserve(capacity)
        pages = self.buffer("key").shape[2] // PAGE
        if self._table is None or self._table.shape[1] != pages:  # a captured step has its address
            self._table = contiguous_table(len(self.clock.seen), pages, self.clock.seen.device)

    def _metadata(self) -> DecodeMetadata:
        assert self._table is not None
        shortest, longest = self.clock.told or (0, self.capacity)
        return DecodeMetadata(self._table, self.clock.seen, longest, shortest, contiguous=True)

    @property
    def per_token(self) -> tuple[str, ...]:
        return tuple(self.store.rows)
