"""Stores that hold a row's first and most recent tokens exactly and hand over, once, each that leaves the window."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from ...artifacts import KvcalError
from ..kv.buffers import Places
from ..kv.saved import Saved
from .forgetting import ForgettingStore


class WindowStore(ForgettingStore):
    """The token at position p of a row is in slot p, or in `sinks + (p - sinks) % window` once a token of its row has
    left. Where more tokens were prefilled than the window holds (`_straight`), slots are in order of position until
    the next decoded token."""

    books = ("left", "_straight")

    def __init__(self, name: str, sinks: int, window: int, dense_below: int) -> None:
        super().__init__(name)
        self.sinks, self.window, self.dense_below = sinks, window, dense_below
        self.left: list[int] = []
        """Tokens of each row that have left: those that follow the sinks."""
        self._straight = False

    @abstractmethod
    def _leave(self, key: Tensor, value: Tensor, position: Tensor, there: Tensor) -> None:
        """Take in m tokens that leave: key, value [B, Hkv, m, D | Dv]; position [B, m] int64, in its row; there [B, m]
        bool, False where a row has fewer to hand over."""

    @abstractmethod
    def _block(self, key: Tensor) -> int:
        """How many tokens of rows and heads like these may leave at once."""

    @property
    def held(self) -> list[int]:
        """Exact tokens of each row."""
        return [length - gone for length, gone in zip(self.lengths, self.left, strict=True)]

    def _append(self, key: Tensor, value: Tensor, valid: Tensor | None) -> None:
        if not self.lengths:
            self._take(key, value, valid)
            return
        comes = torch.ones(key.shape[0], dtype=torch.bool) if valid is None else valid[:, 0]
        self._let_go(comes.tolist())
        self._advance(key, valid, self.held)
        slots = self._slots(torch.tensor(self.lengths).unsqueeze(1) - 1, self.left, straight=False)
        (row,) = comes.nonzero(as_tuple=True)
        row, token, slot = (index.to(key.device) for index in (row, torch.zeros_like(row), slots[row, 0]))
        self._write(key, value, Places(self.held, (row, token, slot), None))

    def make_room(self) -> None:
        if self.lengths:
            self._let_go([True] * len(self.lengths))

    def _let_go(self, comes: list[bool]) -> None:
        """Hand over what one more token of the rows that get one pushes out of their windows."""
        leaving = [self._leaving(row, new) for row, new in enumerate(comes)]
        if any(leaving):
            self._hand_over(leaving)
        left = [gone + count for gone, count in zip(self.left, leaving, strict=True)]
        if self._straight or max(leaving) > 1:
            self._arrange(left, straight=False)
        self.left = left

    def _leaving(self, row: int, new: bool) -> int:
        """How many tokens leave the row when it gets one more, or (not `new`) pauses while others do."""
        length, held = self.lengths[row] + new, self.held[row] + new
        # A row that pauses, and of which none has left, is in order of position as it is.
        if length < self.dense_below or not (new or self.left[row]):
            return 0
        return max(0, held - self.sinks - self.window)

    def _occupied(self) -> int:
        return max(self.held)

    def _changed(self) -> bool:
        return any(self.left)

    def _reset_books(self) -> None:
        self.left = [0] * len(self.lengths)

    def _select_books(self, rows: list[int]) -> None:
        self.left = [self.left[row] for row in rows]

    def read_mask(self) -> Tensor:
        """[B, Hkv, L]: the exact tokens."""
        key = self.rows["key"].view
        position = torch.arange(max(self.lengths), device=key.device)
        length, left = (torch.tensor(of, device=key.device).view(-1, 1, 1) for of in (self.lengths, self.left))
        exact = (position < length) & ((position < self.sinks) | (position >= self.sinks + left))
        return exact.expand(-1, key.shape[1], -1)

    def state(self) -> dict[str, Tensor]:
        """With the tokens in order of position."""
        books = {name: torch.tensor(of, dtype=torch.int64) for name, of in (("left", self.left), ("held", self.held))}
        state = {**super().state(), **books}
        if any(self.left) and not self._straight:
            source = self._source(self.left, straight=True)
            state |= {
                f"rows.{name}": _gather(rows.view, source.to(rows.view.device)) for name, rows in self.rows.items()
            }
        return state

    def restore(self, state: dict[str, Tensor]) -> None:
        super().restore(state)
        self.left = state["left"].tolist()
        self._straight = any(self.left)

    def _check(self, saved: Saved) -> None:
        saved.take_tokens(None)
        left = saved.counts("left", [max(0, length - self.sinks) for length in saved.lengths])
        held = saved.counts("held", saved.lengths)
        most = self.sinks + self.window
        for row, (length, gone, count) in enumerate(zip(saved.lengths, left, held, strict=True)):
            if count + gone != length:
                raise KvcalError(f"held: row {row} of {length} tokens, {gone} of which have left, holds {count}")
            if gone and count < most:
                raise KvcalError(f"left: {gone} tokens of row {row}, which holds {count} and has room for {most}")
        if saved.key.shape[2] != max(held):
            raise KvcalError(f"rows.key: {saved.key.shape[2]} slots, the longest row holds {max(held)} tokens")
        self._check_left(saved, left)

    @abstractmethod
    def _check_left(self, saved: Saved, left: list[int]) -> None:
        """What has been made of the tokens of each row that have left."""

    def _take(self, key: Tensor, value: Tensor, valid: Tensor | None) -> Tensor | None:
        self.left = self.left or [0] * key.shape[0]
        if any(self.left) and not self._straight:
            self._arrange(self.left, straight=True)
        places = self._advance(key, valid, self.held if self.lengths else [0] * key.shape[0])
        self._write(key, value, places)
        return places.limits

    def _write(self, key: Tensor, value: Tensor, places: Places) -> None:
        for name, new in (("key", key), ("value", value)):
            if name not in self.rows:
                self.rows[name] = self._buffer(name)
            self.rows[name].write(new, places)

    def _slots(self, position: Tensor, left: list[int], straight: bool) -> Tensor:
        """[B, n] slots of the tokens at `position` [B, n], on the CPU."""
        gone = torch.tensor(left).unsqueeze(1)
        slots = position - gone if straight else self.sinks + (position - self.sinks) % self.window
        return torch.where((position < self.sinks) | (gone == 0), position, slots)

    def _hand_over(self, leaving: list[int]) -> None:
        """The first `leaving` exact tokens of each row after the sinks, a block at a time."""
        key, value = self.rows["key"].view, self.rows["value"].view
        step, most, counts = self._block(key), max(leaving), torch.tensor(leaving).unsqueeze(1)
        for start in range(0, most, step):
            offset = torch.arange(start, min(start + step, most)).unsqueeze(0)
            there = offset < counts
            position = self.sinks + torch.tensor(self.left).unsqueeze(1) + offset
            slots = self._slots(position, self.left, self._straight).where(there, 0).to(key.device)
            self._leave(_gather(key, slots), _gather(value, slots), position.to(key.device), there.to(key.device))

    def _arrange(self, left: list[int], straight: bool) -> None:
        """Hold only the tokens that remain when `left` tokens of each row are gone, in slots of the layout wanted."""
        source = self._source(left, straight)
        for rows in self.rows.values():
            rows.replace(_gather(rows.view, source.to(rows.view.device)))
        self._straight = straight

    def _source(self, left: list[int], straight: bool) -> Tensor:
        """[B, n] on the CPU: for each slot of that layout the slot where its token lies now."""
        position = torch.arange(max(self.lengths)).expand(len(left), -1)
        gone, length = torch.tensor(left).unsqueeze(1), torch.tensor(self.lengths).unsqueeze(1)
        row, column = ((position < length) & ((position < self.sinks) | (position >= self.sinks + gone))).nonzero(
            as_tuple=True
        )
        before, after = (
            self._slots(position, counts, kind)[row, column]
            for counts, kind in ((self.left, self._straight), (left, straight))
        )
        size = max(1, int(after.max()) + 1 if len(after) else 0)
        source = torch.zeros(len(left), size, dtype=torch.int64)
        source[row, after] = before
        return source


def _gather(tensor: Tensor, slots: Tensor) -> Tensor:
    """[B, H, S, D], [B, n] -> [B, H, n, D]."""
    return tensor.gather(2, slots[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3]))
