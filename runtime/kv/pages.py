"""Token buffers by page, as steps see them: found through a block table, whatever engine allocated them.

Token t of sequence b lies in page `block_table[b, t // PAGE]` of every buffer, at position t % PAGE: keys, values and
what a method keeps beside them alike, so that what moves or shares pages moves or shares all of a token.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from ...kernels.append import append
from ...kernels.backend import choose
from .buffers import TokenBuffer

PAGE = 64
"""Tokens of a page."""
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class DecodeMetadata:
    """What a step has to know of a batch, the same for all of its layers."""

    block_table: Tensor
    """[B, P] int64."""
    seq_lens: Tensor
    """[B] int32: tokens of each sequence, the new one included."""
    longest: int
    """Tokens of the longest sequence, known on the host; where a step is captured and replayed as sequences grow, what
    they may grow to."""
    shortest: int
    """Tokens of the shortest sequence, or fewer."""
    contiguous: bool
    """Whether the block table is 0, 1, 2, …, sequence after sequence, and there are no other pages: a sequence is then
    one view."""
    _reckoned: dict[Hashable, object] = field(default_factory=dict, init=False, repr=False)

    def once(self, name: Hashable, reckon: Callable[[], T]) -> T:
        """What `reckon` gives, for all layers of a step."""
        if name not in self._reckoned:
            self._reckoned[name] = reckon()
        return self._reckoned[name]  # type: ignore[return-value]

    def valid(self) -> Tensor | None:
        """[B, longest] bool: which positions hold a token; None: all."""
        if self.shortest == self.longest:
            return None
        return self.once("valid", lambda: self.positions() < self.seq_lens.unsqueeze(1))

    def positions(self) -> Tensor:
        """[longest] int64: 0, 1, 2, …"""
        return self.once("positions", lambda: torch.arange(self.longest, device=self.seq_lens.device))

    def slots(self, index: Tensor) -> Tensor:
        """The slot mapping, page · PAGE + offset, of positions [B, …] int64 of the sequences."""
        page = self.block_table.gather(1, index.flatten(1) // PAGE).view_as(index)
        return page * PAGE + index % PAGE

    def last_slots(self) -> Tensor:
        """[B] int64: the slot of each sequence's last token."""
        return self.once("last slots", lambda: self.slots(self.seq_lens.long().unsqueeze(1) - 1).squeeze(1))


def contiguous_table(sequences: int, pages: int, device: torch.device) -> Tensor:
    """[B, P] int64 of sequences that have so many pages each, one after the other."""
    return torch.arange(sequences * pages, device=device).view(sequences, pages)


def contiguous_metadata(lengths: tuple[int, ...], capacity: int, device: torch.device) -> DecodeMetadata:
    """Of sequences of these lengths in buffers of `capacity` tokens each: one object for all layers of a step."""
    return _contiguous(lengths, capacity, device, threading.get_ident())


@lru_cache(maxsize=4)
def _contiguous(lengths: tuple[int, ...], capacity: int, device: torch.device, thread: int) -> DecodeMetadata:
    """Args: thread: another may work on another stream, which would not wait for what this one reckons."""
    table, longest, shortest = contiguous_table(len(lengths), capacity // PAGE, device), max(lengths), min(lengths)
    if longest == shortest:  # without a copy from the host, which would wait for the device
        seq_lens = torch.full((len(lengths),), longest, dtype=torch.int32, device=device)
    else:
        seq_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    return DecodeMetadata(table, seq_lens, longest, shortest, contiguous=True)


@dataclass(frozen=True, eq=False)
class LayerCache:
    """One layer's buffers, for the tokens that `metadata` tells of."""

    pages: Mapping[str, Tensor]
    """[N, PAGE, Hkv, …] by name: "key", "value", and what a method keeps beside them."""
    metadata: DecodeMetadata

    def tokens(self, name: str) -> Tensor:
        """[B, Hkv, longest, …]: every token in order; a view where the table is contiguous, else a copy."""
        return self._in_order(name).narrow(2, 0, self.metadata.longest)

    def _in_order(self, name: str) -> Tensor:
        """[B, Hkv, P · PAGE, …]"""
        pages, table = self.pages[name], self.metadata.block_table
        if not self.metadata.contiguous:
            pages = pages[table].flatten(0, 1)
        return pages.view(table.shape[0], -1, *pages.shape[2:]).transpose(1, 2)

    def gather(self, name: str, index: Tensor) -> Tensor:
        """[B, Hkv, K, …]: the tokens at positions `index` [B, Hkv, K] int64 of their sequences."""
        pages = self.pages[name]
        head = torch.arange(pages.shape[2], device=index.device).view(1, -1, 1)
        return pages.flatten(0, 1)[self.metadata.slots(index), head]

    def write_last(self, new: Mapping[str, Tensor]) -> None:
        """Put [B, Hkv, 1, …] of each name where the last token of each sequence belongs."""
        new = dict(new)
        if self.metadata.contiguous and choose("auto", new["key"]) == "triton":
            held = self.metadata.once("held", lambda: self.metadata.seq_lens - 1)
            key, value = (new.pop(name).squeeze(2) for name in ("key", "value"))
            append(key, value, None, self._in_order("key"), self._in_order("value"), None, None, held)  # one launch
        if not new:
            return
        slots = self.metadata.last_slots()
        for name, tensor in new.items():
            pages = self.pages[name]
            pages.view(-1, *pages.shape[2:]).index_copy_(0, slots, tensor.squeeze(2))


class PagedBuffer(TokenBuffer):
    """[B, Hkv, capacity, …] of whole pages, the block table 0, 1, 2, ….

    In memory heads come first, so that the tokens of one head of a sequence lie next to one another.
    """

    @property
    def pages(self) -> Tensor:
        """[N, PAGE, Hkv, …], a view."""
        assert self.tensor is not None
        by_head = self.tensor.transpose(0, 1)
        heads, batch, capacity = by_head.shape[:3]
        by_page = by_head.view(heads, batch * capacity // PAGE, PAGE, *by_head.shape[3:])
        return by_page.permute(1, 2, 0, *range(3, by_page.dim()))

    def keep(self, index: Tensor) -> None:
        if self.tensor is not None:
            by_head = self.tensor.transpose(0, 1)
            self.tensor = by_head.index_select(1, index.to(by_head.device)).transpose(0, 1)

    def _allocate(self, like: Tensor, tokens: int) -> Tensor:
        batch, heads = like.shape[:2]
        return like.new_zeros(heads, batch, tokens, *like.shape[3:]).transpose(0, 1)
