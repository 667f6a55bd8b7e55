"""Token buffers by page, as steps see them: found through a block table, whatever engine allocated them.

Token t of sequence b lies in page `block_table[b, t // PAGE]` of every buffer, at position t % PAGE: keys, values and
what a method keeps beside them alike, so that what moves or shares pages moves or shares all of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
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


@dataclass(frozen=True)
class DecodeMetadata:
    """What a step has to know of a batch, the same for all of its layers."""

    block_table: Tensor
    """[B, P] int64."""
    seq_lens: Tensor
    """[B] int32: tokens of each sequence, the new one included."""
    longest: int
    """No sequence has more tokens. Known on the host: in a captured step, which is replayed as they grow, a bound."""
    shortest: int
    """None has fewer."""
    contiguous: bool = True
    """The block table is 0, 1, 2, …, sequence after sequence, so that a sequence's pages are one view."""
    _reckoned: dict[Hashable, object] = field(default_factory=dict, compare=False, repr=False)

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


@lru_cache(maxsize=8)
def contiguous_metadata(lengths: Sequence[int], capacity: int, device: torch.device) -> DecodeMetadata:
    """Of sequences of these lengths in buffers of `capacity` tokens each: one object for all layers of a step."""
    table = contiguous_table(len(lengths), capacity // PAGE, device)
    return DecodeMetadata(table, torch.tensor(lengths, dtype=torch.int32, device=device), max(lengths), min(lengths))


@dataclass(frozen=True)
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
        slots = self.metadata.last_slots()
        for name, tensor in new.items():
            pages = self.pages[name]
            pages.view(-1, *pages.shape[2:]).index_copy_(0, slots, tensor.squeeze(2))


class PagedBuffer(TokenBuffer):
    """[B, Hkv, capacity, …] of whole pages, the block table 0, 1, 2, ….

    In memory heads come first, so that the tokens of one head of a sequence lie next to one another.
    """

    _pages: tuple[Tensor, Tensor] | None = None

    @property
    def pages(self) -> Tensor:
        """[N, PAGE, Hkv, …], a view."""
        assert self.tensor is not None
        if self._pages is None or self._pages[0] is not self.tensor:
            by_head = self.tensor.transpose(0, 1).flatten(1, 2).unflatten(1, (-1, PAGE))
            self._pages = self.tensor, by_head.permute(1, 2, 0, *range(3, by_head.dim()))
        return self._pages[1]

    def keep(self, index: Tensor) -> None:
        if self.tensor is not None:
            by_head = self.tensor.transpose(0, 1)
            self.tensor = by_head.index_select(1, index.to(by_head.device)).transpose(0, 1)

    def _allocate(self, like: Tensor, tokens: int) -> Tensor:
        batch, heads = like.shape[:2]
        return like.new_zeros(heads, batch, tokens, *like.shape[3:]).transpose(0, 1)
