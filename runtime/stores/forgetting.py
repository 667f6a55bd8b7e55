"""Stores that forget tokens: what they can take back, adopt and save.

Nothing is forgotten before the first decoded token, so that a prompt prefilled in chunks, or over several calls, is
attended densely and leaves the same cache as one prefilled at once.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...artifacts import KvcalError
from ..kv.buffers import TokenBuffer
from .base import Store

if TYPE_CHECKING:
    from .full import FullStore


SLOTS = 16
"""Slots by which buffers grow: what is held is little, and what it does not hold should be free."""


class ForgettingStore(Store):
    """Its buffers hold fewer tokens than came."""

    keeps_all_tokens = False
    books: tuple[str, ...]
    """Attributes that say which tokens are held; all else is in `rows` and `totals`."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self._snapshots: list[dict[str, Any]] = []
        """Before each tentative token."""

    @abstractmethod
    def _occupied(self) -> int:
        """Slots of the row that holds most tokens."""

    @abstractmethod
    def _take(self, key: Tensor, value: Tensor, valid: Tensor | None) -> Tensor | None:
        """Append T tokens in free slots; the limits of their attention."""

    @abstractmethod
    def _changed(self) -> bool:
        """Whether what is held is more, or less, than the tokens that came."""

    @abstractmethod
    def _reset_books(self) -> None:
        """After a crop of a store that has forgotten nothing."""

    @abstractmethod
    def _select_books(self, rows: list[int]) -> None:
        """Keep these rows."""

    def _buffer(self, name: str) -> TokenBuffer:
        return TokenBuffer(chunk=SLOTS)

    def append(self, key: Tensor, value: Tensor, valid: Tensor | None = None) -> None:
        if self._tentative:
            self._snapshots.append(self._snapshot())
        self._append(key, value, valid)

    @abstractmethod
    def _append(self, key: Tensor, value: Tensor, valid: Tensor | None) -> None:
        """Take in one decoded token per row."""

    def crop(self, tokens: int) -> None:
        if tokens == 0:
            return
        if tokens <= len(self._snapshots):
            self._return_to(self._snapshots[-tokens])
            del self._snapshots[-tokens:]
            return
        if self._changed():
            raise KvcalError(
                f"{self.name} cannot take back the last {tokens} tokens, which changed what it holds: crop works for "
                "methods that keep all tokens (full, loki, exact_topk, quest, sparq, clusterkv, spectral), and for "
                "guesses of assisted decoding"
            )
        self._retreat(tokens)
        self._reset_books()
        self._shorten()

    def tentative(self, on: bool) -> None:
        super().tentative(on)
        self._snapshots.clear()

    def adopt(self, full: FullStore) -> None:
        lengths = torch.tensor(full.lengths)
        valid = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
        self._take(full.rows["key"].view, full.rows["value"].view, valid)
        self.seen, self.valid = full.seen, full.valid

    def select(self, index: Tensor) -> None:
        super().select(index)
        if self.lengths:
            self._select_books(index.tolist())
            self._shorten()
        self._snapshots.clear()

    def _shorten(self) -> None:
        for rows in self.rows.values():
            rows.used = self._occupied()

    def _snapshot(self) -> dict[str, Any]:
        return {
            "rows": {name: rows.view.clone() for name, rows in self.rows.items()},
            "totals": {name: total.clone() for name, total in self.totals.items()},
            "own": {name: getattr(self, name) for name in (*self.books, "lengths", "seen", "valid")},
        }

    def _return_to(self, snapshot: dict[str, Any]) -> None:
        for name, tensor in snapshot["rows"].items():
            self.rows[name].replace(tensor)
        self.totals = snapshot["totals"]
        for name, own in snapshot["own"].items():
            setattr(self, name, own)
