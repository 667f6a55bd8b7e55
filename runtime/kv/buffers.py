"""Where tokens lie: sequences of unequal length, left-aligned, in buffers that grow by whole chunks.

Padding is dropped on the way in. So a sequence of a padded batch is stored exactly as if it were alone, and
nothing downstream (pages, budgets, evictions) has to know about padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 256
"""Tokens by which buffers grow."""


@dataclass(frozen=True)
class Places:
    """Where T new tokens of each sequence go."""

    after: list[int]
    """Length of each sequence once they are written."""
    slots: slice | tuple[Tensor, Tensor, Tensor]
    """A slice: the same slots for all sequences; a tuple: (sequence, token, slot), [n] int64 each, without padding."""

    def entries(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """(sequence, token, slot), [n] int64 each."""
        if not isinstance(self.slots, slice):
            return self.slots
        slots = torch.arange(self.slots.start, self.slots.stop, device=device)
        sequence = torch.arange(batch, device=device).repeat_interleave(len(slots))
        return sequence, torch.arange(len(slots), device=device).repeat(batch), slots.repeat(batch)

    def put(self, held: Tensor, new: Tensor) -> None:
        """Write [B, H, T, D] to where they belong in [B, H, S, D]."""
        if isinstance(self.slots, slice):
            held[:, :, self.slots] = new
        else:
            sequence, token, slot = self.slots
            held[sequence, :, slot] = new[sequence, :, token].to(held.dtype)

    def take(self, held: Tensor, tokens: int) -> Tensor:
        """[B, H, T, D]: what lies at the places of these T tokens in [B, H, S, D]; zeros at padding."""
        if isinstance(self.slots, slice):
            return held[:, :, self.slots]
        sequence, token, slot = self.slots
        taken = held.new_zeros(*held.shape[:2], tokens, held.shape[3])
        taken[sequence, :, token] = held[sequence, :, slot]
        return taken

    def positions(self, tokens: int, device: torch.device) -> Tensor:
        """[T], or [B, T] where sequences differ, int64: the tokens' positions in their sequences; 0 at padding."""
        if isinstance(self.slots, slice):
            return torch.arange(self.slots.start, self.slots.stop, device=device)
        sequence, token, slot = self.slots
        found = torch.zeros(len(self.after), tokens, dtype=torch.int64, device=device)
        found[sequence, token] = slot
        return found


def find_places(lengths: Sequence[int], tokens: int, valid: Tensor | None, device: torch.device) -> Places:
    """
    Args:
        valid: [B, T] bool on the CPU, False at padding; None = no padding.
    """
    if valid is None or bool(valid.all()):
        if len(set(lengths)) == 1:
            start = lengths[0]
            return Places([start + tokens] * len(lengths), slice(start, start + tokens))
        valid = torch.ones(len(lengths), tokens, dtype=torch.bool)
    after = torch.tensor(list(lengths)).unsqueeze(1) + valid.cumsum(1)
    sequence, token = valid.nonzero(as_tuple=True)
    slot = after[sequence, token] - 1
    return Places(after[:, -1].tolist(), (sequence.to(device), token.to(device), slot.to(device)))


def visible(held: Sequence[int], tokens: int, valid: Tensor | None, device: torch.device) -> Tensor | None:
    """[B, T] int64: how many of its sequence's tokens each of the last T may see, itself included; None: every sequence
    holds these T tokens and no others, and none of them is padding.

    Args:
        valid: [B, T] bool on the CPU, False at padding; None = no padding.
    """
    if valid is None or bool(valid.all()):
        if set(held) == {tokens}:
            return None
        valid = torch.ones(1, tokens, dtype=torch.bool)
    number = valid.cumsum(1)
    return (torch.tensor(list(held)).unsqueeze(1) - number[:, -1:] + number).to(device)


class TokenBuffer:
    """[B, H, capacity, D], of which the first `used` tokens (the longest sequence's) are in use."""

    moves = True
    """Whether the tokens lie where attention is computed, and move with it to another device."""

    def __init__(self, chunk: int = CHUNK, fill: int = 0):
        """
        Args:
            fill: what stands where nothing was written.
        """
        self.tensor: Tensor | None = None
        self.chunk, self.fill = chunk, fill
        self.used = 0

    def write(self, new: Tensor, places: Places) -> None:
        """Put [B, H, T, D] where `places` says."""
        used = max(self.used, *places.after)
        self.reserve(used, new)
        assert self.tensor is not None
        places.put(self.tensor, new)
        self.used = used

    def reserve(self, tokens: int, like: Tensor) -> None:
        """Make room for `tokens` tokens of the shape and dtype of `like`; what was never written is `fill`."""
        capacity = 0 if self.tensor is None else self.tensor.shape[2]
        if self.tensor is not None and tokens <= capacity:
            return
        grown = self._allocate(like, -(-tokens // self.chunk) * self.chunk)
        if self.tensor is not None:
            grown[:, :, : self.used] = self.view
        self.tensor = grown

    def _allocate(self, like: Tensor, tokens: int) -> Tensor:
        return like.new_full((*like.shape[:2], tokens, like.shape[3]), self.fill)

    @property
    def view(self) -> Tensor:
        """[B, H, used, D]."""
        assert self.tensor is not None
        return self.tensor[:, :, : self.used]

    def replace(self, tensor: Tensor) -> None:
        """Hold a copy of these tokens [B, H, T, D] instead of those held."""
        self.tensor, self.used = None, 0
        self.reserve(tensor.shape[2], tensor)
        assert self.tensor is not None
        self.tensor[:, :, : tensor.shape[2]] = tensor
        self.used = tensor.shape[2]

    def keep(self, order: Tensor) -> None:
        """Keep the sequences `order` [B'] of the batch, in that order."""
        if self.tensor is not None:
            self.tensor = self.tensor.index_select(0, order.to(self.tensor.device))

    def nbytes(self) -> int:
        return 0 if self.tensor is None else self.tensor.nbytes
