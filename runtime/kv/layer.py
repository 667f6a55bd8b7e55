"""The buffers of one layer's cache: what is kept of tokens, of pages and of sequences, with one block table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .buffers import Places, TokenBuffer
from .offload import DeviceCache, Offloaded
from .pages import PAGE, DecodeMetadata, HostPages, LayerCache, PagedBuffer, SummaryBuffer


class Layout(Protocol):
    """What is kept beside keys and values, and what lies on the host; see `methods.base.Policy`."""

    offloaded: tuple[str, ...]
    cached: int
    summarised: tuple[str, ...]
    summarise_every: int
    sums: tuple[str, ...]

    def summarise(self, page: Mapping[str, Tensor]) -> Mapping[str, Tensor]: ...

    def add_up(self, kept: Mapping[str, Tensor]) -> Mapping[str, Tensor]: ...


class LayerBuffers:
    """The buffers of one layer, which grow as tokens are written."""

    def __init__(self, layout: Layout, make: Callable[[str], TokenBuffer] | None = None):
        """
        Args:
            make: gives an empty token buffer by name; None: by pages, on the host where the layout says so.
        """
        self.layout, self._make = layout, make or self._paged
        self.tokens: dict[str, TokenBuffer] = {}
        """What is kept of each token, [B, Hkv, tokens, …]."""
        self.summaries: dict[str, SummaryBuffer] = {}
        """What is kept of each page as a whole, [B, Hkv, pages, …]."""
        self.sums: dict[str, Tensor] = {}
        """What is kept of each sequence as a whole, [B, Hkv, …]."""
        self.device_cache = DeviceCache(layout.cached) if layout.offloaded else None
        self.capacity = 0
        """Tokens per sequence that there is room for."""
        self.widths: Mapping[str, int] = {}
        """Bytes by name of one KV head's entry: for a token, a page or a sequence."""
        self._cache: LayerCache | None = None
        """What the last step saw of the buffers; None: they lie elsewhere since."""

    def _paged(self, name: str) -> TokenBuffer:
        return HostPages() if name in self.layout.offloaded else PagedBuffer()

    # What a step sees

    def at(
        self, metadata: DecodeMetadata, sequence_index: object, built: Callable[[], Mapping[str, Tensor]]
    ) -> LayerCache:
        """
        Args:
            sequence_index: what was built over whole sequences.
            built: gives its tensors by name.
        """
        if self._cache is None:
            tokens = {name: buffer.pages for name, buffer in self.tokens.items()}  # type: ignore[attr-defined]
            summaries = {name: buffer.pages for name, buffer in self.summaries.items()}
            on_host = {name: self.tokens[name] for name in self.layout.offloaded}
            offloaded = Offloaded(on_host, self.device_cache) if self.device_cache else None
            self._cache = LayerCache(tokens, summaries, self.sums, metadata, offloaded, sequence_index)
            kept = {**tokens, **summaries, **self.sums, **built()}
            self.widths = {name: tensor.shape[-1] * tensor.element_size() for name, tensor in kept.items()}
        elif self._cache.metadata is not metadata:
            self._cache = self._cache.at(metadata)
        return self._cache

    def moved(self) -> None:
        """To be called once buffers, or tensors of the sequence index, lie elsewhere than before."""
        self._cache = None

    # Tokens come

    def reserve(self, tokens: int, like: Mapping[str, Tensor]) -> None:
        """Make room for `tokens` tokens of each sequence.

        Args:
            like: tokens [B, Hkv, T, …] by name.
        """
        self.moved()
        for name, tensor in like.items():
            if name not in self.tokens:
                self.tokens[name] = self._make(name)
            self.tokens[name].reserve(tokens, tensor)
        key = self.tokens["key"].tensor
        assert key is not None
        self.capacity = key.shape[2]
        no_pages = {name: buffer.pages[:0] for name, buffer in self.tokens.items()}  # type: ignore[attr-defined]
        for name, tensor in self.layout.summarise(no_pages).items():
            one_page = tensor.new_zeros(len(key), tensor.shape[1], 1, *tensor.shape[2:])
            self.summaries.setdefault(name, SummaryBuffer()).reserve(self.capacity // PAGE, one_page)

    def put(self, new: Mapping[str, Tensor], places: Places) -> None:
        """Write tokens where they belong, and add them to the sums."""
        for name, tensor in new.items():
            self.tokens[name].write(tensor, places)
        if self.layout.sums:
            self._add_up(new, places)

    def _add_up(self, new: Mapping[str, Tensor], places: Places) -> None:
        added = self.layout.add_up(new)
        if not self.sums:
            self.moved()
            self.sums = {name: tensor.new_zeros(*tensor.shape[:2], *tensor.shape[3:]) for name, tensor in added.items()}
        for name, tensor in added.items():
            if not isinstance(places.slots, slice):  # tokens without a slot are padding
                sequence, token, _ = places.slots
                counted = torch.zeros(tensor.shape[0], tensor.shape[2], dtype=torch.bool, device=tensor.device)
                counted[sequence, token] = True
                tensor = tensor.masked_fill(~counted.view(tensor.shape[0], 1, -1, *[1] * (tensor.dim() - 3)), 0)
            self.sums[name].add_(tensor.sum(2))

    def summarise(self, cache: LayerCache, before: Sequence[int], after: Sequence[int]) -> None:
        """Summarise the pages that sequences filled, growing from `before` to `after` tokens; see `summarise_every`."""
        if not self.summaries:
            return
        every, table = self.layout.summarise_every, cache.metadata.block_table
        ends = [-(-(length // every * every) // PAGE) for length in after]
        due = [
            table[sequence, first // PAGE : end] for sequence, (first, end) in enumerate(zip(before, ends, strict=True))
        ]
        cache.summarise(torch.cat(due), self.layout.summarised, self.layout.summarise)

    # Tokens go

    def lengths_changed(self, held: Sequence[int]) -> None:
        """Take note that sequences hold so many tokens now."""
        if self.device_cache:  # new tokens take the slots of those that are gone
            self.device_cache.drop([range(length, self.tokens["key"].used) for length in held])
        longest = max(held)
        for buffer in self.tokens.values():
            buffer.used = longest
        for summary in self.summaries.values():
            summary.used = -(-longest // PAGE)

    def add_up_again(self, valid: Tensor | None) -> None:
        """Make the sums anew from the tokens that are left.

        Args:
            valid: [B, tokens] bool, False past the end of a sequence; None: all are of equal length.
        """
        if not self.sums:
            return
        for name, tensor in self.layout.add_up({name: buffer.view for name, buffer in self.tokens.items()}).items():
            if valid is not None:
                tensor = tensor.masked_fill(~valid.view(len(valid), 1, -1, *[1] * (tensor.dim() - 3)), 0)
            self.sums[name].copy_(tensor.sum(2))

    def drop(self, name: str) -> None:
        """Let go of the token buffer of this name."""
        del self.tokens[name]
        self.moved()

    def clear(self) -> None:
        """Let go of all buffers."""
        self.tokens.clear()
        self.summaries.clear()
        self.sums.clear()
        self.capacity = 0
        self.moved()

    def keep(self, order: Tensor) -> None:
        """Keep the sequences `order` [B'], in that order, repeats allowed."""
        for buffer in (*self.tokens.values(), *self.summaries.values()):
            buffer.keep(order)
        self.sums = {name: tensor.index_select(0, order.to(tensor.device)) for name, tensor in self.sums.items()}
        self._elsewhere()

    def to(self, device: torch.device | str) -> None:
        for buffer in (*self.tokens.values(), *self.summaries.values()):
            if buffer.tensor is not None and buffer.moves:
                buffer.tensor = buffer.tensor.to(device, non_blocking=True)
        self.sums = {name: tensor.to(device, non_blocking=True) for name, tensor in self.sums.items()}
        self._elsewhere()

    def _elsewhere(self) -> None:
        if self.device_cache:
            self.device_cache.clear()
        self.moved()

    # What is held

    def tensors(self) -> list[Tensor]:
        """Token buffers and summaries, [B, Hkv, capacity, …]."""
        buffers = (*self.tokens.values(), *self.summaries.values())
        return [buffer.tensor for buffer in buffers if buffer.tensor is not None]

    def device_bytes(self) -> int:
        """The slack of growing buffers included; what is offloaded is in `host_bytes`."""
        cached = self.device_cache.nbytes() if self.device_cache else 0
        return sum(tensor.nbytes for tensor in (*self.tensors(), *self.sums.values())) + cached - self.host_bytes()

    def host_bytes(self) -> int:
        return sum(self.tokens[name].nbytes() for name in self.layout.offloaded if name in self.tokens)
