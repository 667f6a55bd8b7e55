"""The last rows of every sequence as they came, beside what is kept of all tokens in fewer bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .buffers import Places
from .saved import FLOATS, Saved, require

SPARE = 16
"""Rows beyond those asked for: so many tokens may be taken back, as guesses are, and the last rows are still there."""
NAMES = ("recent_key", "recent_value")
POSITION = "recent_position"


class RecentRows:
    """Keys and values of each sequence's last `count` tokens, and of `SPARE` before them, which are not read.

    Token t lies in slot t % slots; after a `crop`, slots of tokens that are gone are empty until others come.
    """

    def __init__(self, count: int):
        self.count, self.slots = count, count + SPARE
        self.rows: dict[str, Tensor] = {}
        """[B, H, slots, D | Dv] by NAMES; empty before the first token."""
        self.position = torch.empty(0, self.slots, dtype=torch.int64)
        """[B, slots] the token in each slot; -1: none."""

    def put(self, key: Tensor, value: Tensor, places: Places) -> None:
        """Take in new tokens, [B, H, T, D | Dv]."""
        if not self.rows:
            for name, new in zip(NAMES, (key, value), strict=True):
                self.rows[name] = new.new_zeros(*new.shape[:2], self.slots, new.shape[3])
            self.position = torch.full((len(key), self.slots), -1, device=key.device)
        sequence, token, slot = places.entries(len(key), key.device)
        last = slot >= torch.tensor(places.after, device=key.device)[sequence] - self.slots
        sequence, token, slot = sequence[last], token[last], slot[last]
        for name, new in zip(NAMES, (key, value), strict=True):
            self.rows[name][sequence, :, slot % self.slots] = new[sequence, :, token]
        self.position[sequence, slot % self.slots] = slot

    def over_all(self, rows: Sequence[Tensor], lengths: Tensor) -> None:
        """Write the last rows over those of [B, H, S, D | Dv], keys and values of every token.

        Args:
            lengths: [B] tokens of each sequence.
        """
        first = (lengths.long() - self.count).clamp_min(0).unsqueeze(1)
        held = (self.position >= first) & (self.position < lengths.unsqueeze(1))
        sequence, slot = held.nonzero(as_tuple=True)
        for name, every in zip(NAMES, rows, strict=True):
            every[sequence, :, self.position[sequence, slot]] = self.rows[name][sequence, :, slot].to(every.dtype)

    def over(self, rows: Sequence[Tensor], index: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, K, D | Dv] of the tokens `index` [B, H, K], the last ones as they came."""
        slot = index % self.slots
        held = self.position.unsqueeze(1).expand(*index.shape[:2], -1).gather(2, slot) == index
        held &= index >= (lengths.long() - self.count).view(-1, 1, 1)
        found = []
        for name, chosen in zip(NAMES, rows, strict=True):
            exact = self.rows[name].gather(2, slot.unsqueeze(-1).expand(*slot.shape, chosen.shape[-1]))
            found.append(torch.where(held.unsqueeze(-1), exact.to(chosen.dtype), chosen))
        return found[0], found[1]

    def crop(self, lengths: Sequence[int]) -> None:
        """Forget tokens beyond these lengths."""
        if not self.rows:
            return
        gone = self.position >= torch.tensor(lengths, device=self.position.device).unsqueeze(1)
        self.position.masked_fill_(gone, -1)

    def reorder(self, order: Tensor) -> None:
        """Keep the sequences `order` [B'], repeats allowed."""
        if not self.rows:
            return
        order = order.to(self.position.device)
        self.rows = {name: rows.index_select(0, order) for name, rows in self.rows.items()}
        self.position = self.position.index_select(0, order)

    def to(self, device: torch.device | str) -> None:
        self.rows = {name: rows.to(device) for name, rows in self.rows.items()}
        self.position = self.position.to(device)

    # Saved caches

    def state(self) -> dict[str, Tensor]:
        return {**self.rows, POSITION: self.position} if self.rows else {}

    def check(self, saved: Saved) -> None:
        """Raises KvcalError: no such rows can be of this saved cache."""
        for name, empty in zip(NAMES, ("like.key", "like.value"), strict=True):
            like = saved.take(empty, FLOATS, 0, None, 0, None)
            saved.take(name, like.dtype, saved.batch, like.shape[1], self.slots, like.shape[3])
        position = saved.take(POSITION, torch.int64, saved.batch, self.slots)
        lengths = torch.tensor(saved.lengths).unsqueeze(1)
        slots = torch.arange(self.slots)
        own = (position % self.slots == slots) & (position >= lengths - self.slots) & (position < lengths)
        require(POSITION, own | (position == -1), "the token in this slot among the last, or -1")

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.rows = {name: state[name].clone() for name in NAMES}
        self.position = state[POSITION].clone()
