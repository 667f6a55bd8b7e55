"""Stores that keep every token's key and value and decide at each step what to read of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..attention import Logits, attention, causal_attention
from ..kv.buffers import Places, lengths_mask
from .base import Store
from .saved import Saved

if TYPE_CHECKING:
    from .full import FullStore


class RowStore(Store):
    """Everything stays, left-aligned, in buffers `key` and `value`."""

    keeps_all_tokens = True

    def prefill(self, query: Tensor, key: Tensor, value: Tensor, logits: Logits, valid: Tensor | None = None) -> Tensor:
        self._limits = self._extend(key, value, valid).limits
        return self.attend_all(query, logits)

    def attend_all(self, query: Tensor, logits: Logits) -> Tensor:
        key, value = self._whole("key"), self._whole("value")
        return causal_attention(self._encode_query(query), key, value, logits, self._limits)

    def append(self, key: Tensor, value: Tensor, valid: Tensor | None = None) -> None:
        self._extend(key, value, valid)

    def crop(self, tokens: int) -> None:
        self._retreat(tokens)
        self._shorten()

    def select(self, index: Tensor) -> None:
        super().select(index)
        if self.lengths and max(self.lengths) < self.rows["key"].used:
            self._shorten()

    def adopt(self, full: FullStore) -> None:
        lengths = torch.tensor(full.lengths)
        valid = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
        self._extend(full.rows["key"].view, full.rows["value"].view, valid)
        self.seen, self.valid = full.seen, full.valid

    def to(self, device: torch.device | str) -> None:
        super().to(device)
        self._device = torch.device(device)

    def restore(self, state: dict[str, Tensor]) -> None:
        super().restore(state)
        places = [rows.tensor.device for rows in self.rows.values() if rows.tensor is not None and rows.moves]
        self._device = places[0] if places else self._device

    def _check(self, saved: Saved) -> None:
        saved.take_tokens(saved.longest)

    def attend_densely(self, query: Tensor, logits: Logits) -> Tensor:
        """Read everything; the last step of `full`, and of short contexts."""
        key, value = self._whole("key"), self._whole("value")
        row = key.shape[3] * key.element_size() + value.shape[3] * value.element_size()
        self._read = sum(self.lengths) * key.shape[1] * row + self._encoding_bytes()
        self._read_rows = None
        return attention(self._encode_query(query), key, value, logits, self._held())

    def read_mask(self) -> Tensor:
        key = self.rows["key"].view
        if self._read_rows is None:
            mask = torch.ones(key.shape[:3], dtype=torch.bool, device=key.device)
            held = lengths_mask(self.lengths, key.device)
            return mask if held is None else mask & held[:, :, 0]
        index, counted = self._read_rows
        mask = torch.zeros(*index.shape[:2], key.shape[2], dtype=torch.bool, device=index.device)
        if counted is None:
            return mask.scatter_(2, index, True)
        # Rows with a smaller budget repeat indices that do not count: add instead of set.
        return mask.to(torch.int32).scatter_add_(2, index, counted.to(torch.int32)) > 0

    _device = torch.device("cpu")
    """Where tokens come from and attention is computed."""
    _limits: Tensor | None = None
    """Of the last prefill: see `Places`."""
    _read_rows: tuple[Tensor, Tensor | None] | None = None
    """Of the last step: indices [B, H, k] and which of them count; None: everything."""

    def _extend(self, key: Tensor, value: Tensor, valid: Tensor | None) -> Places:
        places = self._advance(key, valid)
        self._device = key.device
        for name, new in (("key", self._encode_key(key)), ("value", value)):
            self.rows.setdefault(name, self._buffer(name)).write(new, places)
        self._extended(key, value, places)
        return places

    def _whole(self, name: str) -> Tensor:
        """All keys or values, where attention is computed."""
        return self.rows[name].view

    def _shorten(self) -> None:
        self._forget()
        for name in ("key", "value"):
            self.rows[name].used = max(self.lengths)

    def _held(self) -> Tensor | None:
        """[B, 1, 1, S] bool; None when every row has S tokens."""
        return lengths_mask(self.lengths, self._device)

    # What a method may keep beside keys and values

    def _encode_key(self, key: Tensor) -> Tensor:
        """How keys are stored; queries of `_encode_query` have the same dot products with them."""
        return key

    def _encode_query(self, query: Tensor) -> Tensor:
        return query

    def _encoding_bytes(self) -> int:
        return 0

    def _extended(self, key: Tensor, value: Tensor, places: Places) -> None:
        """New tokens were written."""

    def _forget(self) -> None:
        """Rows are about to have `lengths` tokens, fewer than before, or the batch has lost its longest rows; keys and
        values still stand."""
