"""The step of a policy: what runs eagerly, over buffers that stand still and with lengths that the device counts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from ..attention import Logits
from ..kv.pages import PAGE, DecodeMetadata, LayerCache, contiguous_table
from ..methods.base import Attended, bytes_read
from ..stores.paged import PagedStore
from .step import Step


class PagedStep(Step):
    store: PagedStore

    _last: tuple[LayerCache, Attended]

    def write(self, key: Tensor, value: Tensor) -> None:
        self.cache().write_last(self.store.encoded(key.unsqueeze(2), value.unsqueeze(2)))

    def read(self, query: Tensor, logits: Logits) -> Tensor:
        cache = self.cache()
        found = self.store.policy.step(query, cache, logits)
        self._last = cache, found
        return found.output

    def cache(self) -> LayerCache:
        return LayerCache(self.store.pages(), self.clock.once(("metadata", self.capacity), self._metadata))

    def _metadata(self) -> DecodeMetadata:
        shortest, longest = self.clock.told or (0, self.capacity)
        table = contiguous_table(len(self.clock.seen), self.buffer("key").shape[2] // PAGE, self.clock.seen.device)
        return DecodeMetadata(table, self.clock.seen.clone(), longest, shortest)  # a copy: the clock goes on

    def reading(self, query: Tensor, logits: Logits) -> Callable[[], int]:
        cache, found = self._last
        return partial(bytes_read, self.store.policy, cache, found.selected)

    @property
    def per_token(self) -> tuple[str, ...]:
        return tuple(self.store.rows)
