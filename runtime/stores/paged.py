"""A policy of `runtime/methods` as a store: one layer's sequences by page, with their lengths on the host.

The way in for methods that have moved to the new rooms, for as long as others live in these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..attention import Logits, causal_attention
from ..kv.buffers import Places, TokenBuffer
from ..kv.pages import LayerCache, PagedBuffer, contiguous_metadata
from ..methods.base import Policy, Reading
from .base import Store
from .saved import Saved

if TYPE_CHECKING:
    from .full import FullStore

ROWS = ("key", "value")


class PagedStore(Store):
    keeps_all_tokens = True

    def __init__(self, policy: Policy):
        super().__init__()
        self.policy = policy
        self._limits: Tensor | None = None
        self._last: Reading | None = None
        """Of the last step, for `bytes_read` and `read_mask`."""

    def prefill(self, query: Tensor, key: Tensor, value: Tensor, logits: Logits, valid: Tensor | None = None) -> Tensor:
        self._limits = self._write(key, value, valid).limits
        return self.attend_all(query, logits)

    def attend_all(self, query: Tensor, logits: Logits) -> Tensor:
        return causal_attention(query, self.rows["key"].view, self.rows["value"].view, logits, self._limits)

    def append(self, key: Tensor, value: Tensor, valid: Tensor | None = None) -> None:
        if key.shape[2] > 1 or (valid is not None and not bool(valid.all())):
            self._write(key, value, valid)
            return
        self._advance(key, valid)
        new = self.encoded(key, value)
        for name, tensor in new.items():
            rows = self.rows.setdefault(name, self._buffer(name))
            rows.reserve(max(self.lengths), tensor)
            rows.used = max(self.lengths)
        self.cache().write_last(new)

    def attend(self, query: Tensor, logits: Logits) -> Tensor:
        cache = self.cache()
        found = self.policy.step(query, cache, logits)
        self._last = Reading.of(self.policy, cache, found.selected)
        return found.output

    def cache(self) -> LayerCache:
        """What a step sees of this store now."""
        tensor = self._tensor()
        metadata = contiguous_metadata(tuple(self.lengths), tensor.shape[2], tensor.device)
        return LayerCache(self.pages(), metadata)

    def pages(self) -> dict[str, Tensor]:
        return {name: rows.pages for name, rows in self.rows.items()}  # type: ignore[attr-defined]

    def bytes_read(self) -> int:
        return 0 if self._last is None else self._last.bytes_read()

    def reading(self) -> Callable[[], int]:
        return self.bytes_read if self._last is None else self._last.bytes_read

    def shared_bytes(self) -> int:
        return self.policy.shared_bytes()

    def read_mask(self) -> Tensor:
        assert self._last is not None
        return self._last.mask()

    def crop(self, tokens: int) -> None:
        self._retreat(tokens)
        self._shorten()

    def select(self, index: Tensor) -> None:
        super().select(index)
        if self.lengths:
            self._shorten()

    def adopt(self, full: FullStore) -> None:
        lengths = torch.tensor(full.lengths)
        valid = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
        self._write(full.rows["key"].view, full.rows["value"].view, valid)
        self.seen, self.valid = full.seen, full.valid

    def state(self) -> dict[str, Tensor]:
        """Without what follows from keys and values."""
        encoded = {f"rows.{name}" for name in self.rows if name not in ROWS}
        return {name: tensor for name, tensor in super().state().items() if name not in encoded}

    def restore(self, state: dict[str, Tensor]) -> None:
        super().restore(state)
        if self.seen:
            whole = Places(self.lengths, slice(0, max(self.lengths)), None)
            self._put(self.policy.encode(state["rows.key"], state["rows.value"]), whole)

    def _check(self, saved: Saved) -> None:
        saved.take_tokens(saved.longest)

    def _buffer(self, name: str) -> TokenBuffer:
        return PagedBuffer()

    def _write(self, key: Tensor, value: Tensor, valid: Tensor | None) -> Places:
        places = self._advance(key, valid)
        self._put(self.encoded(key, value), places)
        return places

    def encoded(self, key: Tensor, value: Tensor) -> dict[str, Tensor]:
        """All that is kept of tokens."""
        return {"key": key, "value": value, **self.policy.encode(key, value)}

    def _put(self, new: Mapping[str, Tensor], places: Places) -> None:
        for name, tensor in new.items():
            self.rows.setdefault(name, self._buffer(name)).write(tensor, places)

    def _shorten(self) -> None:
        for rows in self.rows.values():
            rows.used = max(self.lengths)

    def _tensor(self) -> Tensor:
        tensor = self.rows["key"].tensor
        assert tensor is not None
        return tensor
