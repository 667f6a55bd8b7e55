"""Token buffers by page, as steps see them: found through a block table, whatever engine allocated them.

Token t of sequence b lies in page `block_table[b, t // PAGE]` of every buffer, at offset t % PAGE: keys, values and
what a method keeps beside them alike, so that what moves or shares pages moves or shares all of a token.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from ...kernels.append import append
from ...kernels.backend import choose
from ...kernels.pages import PAGE
from .buffers import CHUNK, Places, TokenBuffer
from .offload import Offloaded, on_host
from .recent import RecentRows

POSITION = "position"
"""The buffer of this name tells which token's keys and values a slot holds, [B, Hkv, slots, 1] int32, -1 where it is
free; only where fewer tokens are held than came."""
RECEIVED = "received"
"""The buffer of this name tells the attention that each token has received so far, [B, Hkv, tokens, 1] float32."""
Summarise = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""From the tokens of n pages, [n, PAGE, Hkv, …] by name, to the summaries of these pages, [n, Hkv, …] by name."""
T = TypeVar("T")


class OncePerStep:
    """Keeps what is the same in all layers of a step."""

    _reckoned: dict[Hashable, object]

    def once(self, name: Hashable, reckon: Callable[[], T]) -> T:
        """What `reckon` gives; called by the first layer that asks for this name."""
        if name not in self._reckoned:
            self._reckoned[name] = reckon()
        return self._reckoned[name]  # type: ignore[return-value]


@dataclass(frozen=True, eq=False)
class DecodeMetadata(OncePerStep):
    """What a step has to know of a batch, the same for all of its layers."""

    block_table: Tensor
    """[B, P] int32 or int64."""
    seq_lens: Tensor
    """[B] int32: tokens of each sequence, the new one included."""
    longest: int
    """Tokens of the longest sequence, known on the host; in a captured step, which is replayed as sequences grow, the
    most that they may grow to."""
    shortest: int
    """Tokens of the shortest sequence, or a lower bound of that."""
    contiguous: bool
    """Whether the block table is 0, 1, 2, …, sequence after sequence, and there are no other pages: a sequence is then
    one view."""
    lengths: tuple[int, ...] | None = None
    """`seq_lens` on the host; None: the host does not know them."""
    replayed: bool = False
    """Whether the step is captured and replayed, after which nobody can ask what it has read."""
    whole: DecodeMetadata | None = None
    """Where tokens were evicted the other fields describe the slots that are held, and this tells the lengths with all
    tokens so far (its block table means nothing)."""
    _reckoned: dict[Hashable, object] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def table(self) -> Tensor | None:
        """The block table that kernels need to find tokens; None: each sequence is one view."""
        return None if self.contiguous else self.block_table

    def may_fill(self, tokens: int) -> bool:
        """Whether a sequence may have a multiple of `tokens` tokens now; True where the host does not know lengths."""
        if self.lengths is None:
            return True
        for length in self.lengths:  # noqa: SIM110 (a generator would be called for every layer of every token)
            if length % tokens == 0:
                return True
        return False

    def valid(self) -> Tensor | None:
        """[B, longest] bool: which positions hold a token; None: all."""
        if self.shortest == self.longest:
            return None
        return self.once("valid", lambda: self.positions() < self.seq_lens.unsqueeze(1))

    def positions(self) -> Tensor:
        """[longest] int64: 0, 1, 2, …"""
        return self.once("positions", lambda: torch.arange(self.longest, device=self.seq_lens.device))

    def places(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """(pages, places in them) of positions [B, …] int64 of the sequences."""
        page = self.block_table.gather(1, index.flatten(1) // PAGE).view_as(index)
        return page.long(), index % PAGE

    def slots(self, index: Tensor) -> Tensor:
        """The slot mapping, page · PAGE + place, of positions [B, …] int64 of the sequences."""
        page, place = self.places(index)
        return page * PAGE + place

    def held(self) -> Tensor:
        """[B] int32: tokens of each sequence before the new one."""
        return self.once("held", lambda: self.seq_lens - 1)

    def last_slots(self) -> Tensor:
        """[B] int64: the slot of each sequence's last token."""
        page, place = self.last_places()
        return page * PAGE + place

    def last_places(self) -> tuple[Tensor, Tensor]:
        """([B] page, [B] place in it) of each sequence's last token; of one without tokens the first of its row."""
        page, place = self.places((self.seq_lens.long().unsqueeze(1) - 1).clamp_min(0))
        return page.squeeze(1), place.squeeze(1)


def contiguous_table(sequences: int, pages: int, device: torch.device) -> Tensor:
    """[B, P] int64 of sequences that have so many pages each, one after the other."""
    return torch.arange(sequences * pages, device=device).view(sequences, pages)


def contiguous_metadata(
    lengths: tuple[int, ...], capacity: int, device: torch.device, all_lengths: tuple[int, ...] | None = None
) -> DecodeMetadata:
    """Metadata of sequences of these lengths in buffers of `capacity` tokens each: one object for all layers of a step.

    Args:
        all_lengths: tokens of each sequence so far, where fewer are held.
    """
    return _contiguous(lengths, capacity, device, all_lengths, threading.get_ident())


@lru_cache(maxsize=8)
def _contiguous(
    lengths: tuple[int, ...], capacity: int, device: torch.device, all_lengths: tuple[int, ...] | None, thread: int
) -> DecodeMetadata:
    """
    Args:
        thread: has an object of its own: it may work on another stream, which would not wait for what others reckon.
    """
    whole = None if all_lengths is None else _contiguous(all_lengths, PAGE, device, None, thread)
    table, longest, shortest = contiguous_table(len(lengths), capacity // PAGE, device), max(lengths), min(lengths)
    if longest == shortest:  # without a copy from the host, which would wait for the device
        seq_lens = torch.full((len(lengths),), longest, dtype=torch.int32, device=device)
    else:
        seq_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    return DecodeMetadata(table, seq_lens, longest, shortest, contiguous=True, lengths=lengths, whole=whole)


@dataclass(frozen=True, eq=False)
class LayerCache:
    """One layer's buffers as a step sees them, with the tokens that `metadata` describes."""

    pages: Mapping[str, Tensor]
    """[N, PAGE, Hkv, …] by name: "key", "value", and what a method keeps beside them."""
    summaries: Mapping[str, Tensor]
    """[N, Hkv, …] by name: what is kept of a page as a whole."""
    sums: Mapping[str, Tensor]
    """[B, Hkv, …] by name: what is kept of a sequence as a whole."""
    metadata: DecodeMetadata
    offloaded: Offloaded | None = None
    """Those of `pages` that lie on the host; None: none do."""
    sequence_index: object = None
    """What a method has built over whole sequences."""
    earlier: Sequence[LayerCache] = ()
    """Of the layers that this one's tokens are kept relative to; they may hold more tokens than `metadata` tells."""
    recent: RecentRows | None = None
    """The last tokens as they came, where others are kept in fewer bits."""
    _prepared: dict[Hashable, object] = field(default_factory=dict, repr=False)
    """What was made of the buffers where they lie, see `prepared`."""

    def at(self, metadata: DecodeMetadata) -> LayerCache:
        """The same buffers and the same block table, at another step."""
        return LayerCache(
            self.pages, self.summaries, self.sums, metadata, self.offloaded, self.sequence_index, self.earlier,
            self.recent, self._prepared,
        )  # fmt: skip

    def prepared(self, name: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives, called once as long as the buffers stand still: views of them, say."""
        if name not in self._prepared:
            self._prepared[name] = make()
        return self._prepared[name]  # type: ignore[return-value]

    @property
    def heads(self) -> int:
        """Hkv"""
        return self.pages["key"].shape[2]

    def tokens(self, name: str) -> Tensor:
        """[B, Hkv, longest, …] on the device: every token in order; where the table is contiguous, a view."""
        ordered = self.buffer(name)
        ordered = ordered.narrow(2, 0, self.metadata.longest)
        if self.offloaded is not None and name in self.offloaded.names:
            return ordered.to(self.metadata.seq_lens.device)
        return ordered

    def buffer(self, name: str) -> Tensor:
        """[B, Hkv, P · PAGE, …]: every token in order, up to the capacity; where the table is contiguous, a view."""
        if name in self._prepared:
            return self._prepared[name]  # type: ignore[return-value]
        pages, table = self.pages[name], self.metadata.block_table
        if not self.metadata.contiguous:
            return pages[table.long()].flatten(1, 2).transpose(1, 2)
        return self.prepared(name, lambda: pages.view(table.shape[0], -1, *pages.shape[2:]).transpose(1, 2))

    def part(self, name: str) -> Tensor:
        """What kernels take beside the metadata's `table`: [B, Hkv, capacity, …], or [N, Hkv, PAGE, …] by page."""
        return self.buffer(name) if self.metadata.contiguous else self.pages[name].transpose(1, 2)

    def summary_part(self, name: str) -> Tensor:
        """Likewise of summaries: [B, Hkv, P, …], or [N, Hkv, 1, …] by page."""
        return self.summary(name) if self.metadata.contiguous else self.summaries[name].unsqueeze(2)

    def sum_of(self, name: str) -> Tensor:
        """[B, Hkv, …]: what is kept of each sequence as a whole."""
        return self.sums[name]

    def gather(self, names: Sequence[str], index: Tensor, valid: Tensor | None = None) -> list[Tensor]:
        """[B, Hkv, K, …] of each name: the tokens at positions `index` [B, Hkv, K] int64 of their sequences.

        Args:
            valid: bool of the shape of `index`, False where an entry is padding; None: nowhere.
        """
        if self.offloaded is not None and names[0] in self.offloaded.names:
            return self.offloaded.gather(names, index, valid)
        metadata, heads = self.metadata, index.shape[1]
        head = metadata.once(("heads", heads), lambda: torch.arange(heads, device=index.device).view(1, -1, 1))
        if not metadata.contiguous:
            page, place = metadata.places(index)
            return [self.pages[name][page, place, head] for name in names]
        slots = metadata.slots(index)
        return [self.pages[name].flatten(0, 1)[slots, head] for name in names]

    def summary(self, name: str) -> Tensor:
        """[B, Hkv, P, …]: the summaries of every sequence's pages in order; where the table is contiguous, a view."""
        table, pages = self.metadata.block_table, self.summaries[name]
        ordered = pages.unflatten(0, table.shape) if self.metadata.contiguous else pages[table.long()]
        return ordered.transpose(1, 2)

    def write_last(self, new: Mapping[str, Tensor]) -> None:
        """Put [B, Hkv, 1, …] of each name where the last token of each sequence belongs."""
        metadata, new = self.metadata, dict(new)
        if {"key", "value"} <= new.keys() and choose("auto", new["key"]) == "triton":
            held = metadata.held()
            key, value = new.pop("key").squeeze(2), new.pop("value").squeeze(2)
            append(key, value, self.part("key"), self.part("value"), held, table=metadata.table)  # one launch
        if not new:
            return
        if not metadata.contiguous:
            last = metadata.once("last places", metadata.last_places)
            for name, tensor in new.items():
                self.pages[name].index_put_(last, tensor.squeeze(2))
            return
        slots = metadata.once("last slots", metadata.last_slots)
        for name, tensor in new.items():
            pages = self.pages[name]
            pages.view(-1, *pages.shape[2:]).index_copy_(0, slots, tensor.squeeze(2))

    def write_at(self, new: Mapping[str, Tensor], slot: Tensor) -> None:
        """Put [B, Hkv, 1, …] of each name into slots [B, Hkv] int64 of contiguous pages."""
        for name, tensor in new.items():
            index = slot[:, :, None, None].expand(-1, -1, 1, tensor.shape[3])
            self.buffer(name).scatter_(2, index, tensor)

    def receive(self, attention: Tensor) -> None:
        """Add [B, Hkv, n] float32 to the attention that the first n tokens have received so far."""
        self.tokens(RECEIVED)[:, :, : attention.shape[2]].add_(attention.unsqueeze(-1))

    def add_last(self, new: Mapping[str, Tensor]) -> None:
        """Add [B, Hkv, 1, …] of each name to the sums."""
        for name, tensor in new.items():
            self.sums[name].add_(tensor.squeeze(2))

    def _of_pages(self, page: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """[n, PAGE, Hkv, …] of each name: the tokens in pages `page` [n] int64, on the device of `page`."""
        return {name: self.pages[name][page.to(self.pages[name].device)].to(page.device) for name in names}

    def summarise(self, page: Tensor, names: Sequence[str], by: Summarise) -> None:
        """Write the summaries of pages [n] int64, which `by` makes of their tokens by these names."""
        for name, new in by(self._of_pages(page, names)).items():
            self.summaries[name].index_copy_(0, page, new)

    def summarise_last(self, names: Sequence[str], by: Summarise, every: int) -> None:
        """`summarise` the last page of each sequence whose length is a multiple of `every`."""
        page, _ = self.metadata.once("last places", self.metadata.last_places)
        full = self.metadata.seq_lens % every == 0
        for name, new in by(self._of_pages(page, names)).items():
            held = self.summaries[name]
            held.index_copy_(0, page, torch.where(full.view(-1, *[1] * (new.dim() - 1)), new, held[page]))


class PagedBuffer(TokenBuffer):
    """[B, Hkv, capacity, …] of whole pages, with the block table 0, 1, 2, ….

    In memory heads come first, so that the tokens of one head of a sequence lie next to one another.
    """

    page_size = PAGE

    @property
    def pages(self) -> Tensor:
        """[N, PAGE, Hkv, …], a view."""
        assert self.tensor is not None
        by_head = self.tensor.transpose(0, 1)
        heads, batch, capacity = by_head.shape[:3]
        by_page = by_head.view(heads, batch * capacity // self.page_size, self.page_size, *by_head.shape[3:])
        return by_page.permute(1, 2, 0, *range(3, by_page.dim()))

    def keep(self, order: Tensor) -> None:
        if self.tensor is not None:
            by_head = self.tensor.transpose(0, 1)
            self.tensor = by_head.index_select(1, order.to(by_head.device)).transpose(0, 1)

    def _allocate(self, like: Tensor, tokens: int) -> Tensor:
        batch, heads = like.shape[:2]
        return like.new_full((heads, batch, tokens, *like.shape[3:]), self.fill).transpose(0, 1)


class SlotBuffer(PagedBuffer):
    """A `PagedBuffer` that grows by fewer tokens, for caches that hold few and should have little slack."""

    page_size = 16

    def __init__(self, fill: int = 0):
        super().__init__(self.page_size, fill)


class HostPages(PagedBuffer):
    """A `PagedBuffer` in host memory, pinned where there is a GPU, whatever device new tokens come from."""

    moves = False

    def write(self, new: Tensor, places: Places) -> None:
        super().write(new.cpu(), on_host(places))

    def _allocate(self, like: Tensor, tokens: int) -> Tensor:
        batch, heads = like.shape[:2]
        shape = heads, batch, tokens, *like.shape[3:]
        return torch.zeros(shape, dtype=like.dtype, pin_memory=torch.cuda.is_available()).transpose(0, 1)


class SummaryBuffer(PagedBuffer):
    """[B, Hkv, pages, …]: an entry for every page of a `PagedBuffer` of the same batch."""

    def __init__(self) -> None:
        super().__init__(CHUNK // PAGE)

    @property
    def pages(self) -> Tensor:
        """[N, Hkv, …], a view."""
        assert self.tensor is not None
        by_head = self.tensor.transpose(0, 1)
        return by_head.view(by_head.shape[0], -1, *by_head.shape[3:]).transpose(0, 1)
