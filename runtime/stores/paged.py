"""An adapter: a policy of `runtime/methods` behind the interface of a store, with one layer's sequences by page and
their lengths on the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..attention import Logits, causal_attention
from ..kv.buffers import Places, TokenBuffer
from ..kv.offload import DeviceCache, Offloaded
from ..kv.pages import (
    PAGE,
    DecodeMetadata,
    HostPages,
    LayerCache,
    PagedBuffer,
    SummaryBuffer,
    contiguous_metadata,
)
from ..kv.saved import FLOATS, Saved, require
from ..methods.base import Policy, Reading, Widths
from .base import Store

if TYPE_CHECKING:
    from .full import FullStore

ROWS = ("key", "value")


class PagedStore(Store):
    keeps_all_tokens = True

    def __init__(self, policy: Policy):
        super().__init__()
        self.policy = policy
        self.summaries: dict[str, SummaryBuffer] = {}
        self.sums: dict[str, Tensor] = {}
        self.index = policy.index()
        self.device_cache = DeviceCache(policy.cached) if policy.offloaded else None
        self._like: tuple[Tensor, Tensor] | None = None
        self._capacity = 0
        """Tokens of a sequence that there is room for."""
        self._cache: LayerCache | None = None
        """Of the buffers as they are, at some step; None: they have changed since."""
        self._metadata: DecodeMetadata | None = None
        """Of the sequences as they are; None: they have changed since."""
        self._widths: Widths = {}
        self._limits: Tensor | None = None
        self._last: Reading | None = None
        """Of the last step, for `bytes_read` and `read_mask`."""

    def prefill(self, query: Tensor, key: Tensor, value: Tensor, logits: Logits, valid: Tensor | None = None) -> Tensor:
        before = self.lengths or [0] * len(key)
        self._limits = self._write(key, value, valid).limits
        if self.index is not None:
            self._prefilled(before, key.device)
        return self.attend_all(query, logits)

    def _before_token(self, key: Tensor, coming: Sequence[bool]) -> None:
        """See to what is due in the sequence index."""
        assert self.index is not None
        lengths = self.lengths or [0] * len(key)
        self.index.begin(len(lengths), key.device)
        if self.index.due(lengths):
            self.index.build(lengths, coming, self.rows)
            self._cache = None

    def _prefilled(self, before: list[int], device: torch.device) -> None:
        """Tell the sequence index."""
        assert self.index is not None
        self.index.begin(len(before), device)
        self.index.prefilled(before, self.lengths, self.rows)
        self._cache = None

    def attend_all(self, query: Tensor, logits: Logits) -> Tensor:
        key, value = (of.to(query.dtype) for of in self.policy.rows(self.cache()))
        return causal_attention(self.policy.query(query), key, value, logits, self._limits)

    def append(self, key: Tensor, value: Tensor, valid: Tensor | None = None) -> None:
        if self.index is not None:
            self._before_token(key, [True] * len(key) if valid is None else valid[:, 0].tolist())
        if key.shape[2] > 1 or (valid is not None and not bool(valid.all())):
            self._write(key, value, valid)
            return
        places = self._advance(key, valid)
        new = dict(self._encoded(key, value))
        if max(self.lengths) > self._capacity:
            self._reserve(max(self.lengths), new)
        self.lengths_changed()
        if self.policy.sums:
            self._add_up(new, places)
        cache = self.cache()
        for name in self.policy.offloaded:
            self.rows[name].write(new.pop(name), places)
        cache.write_last(new)
        if self.summaries and cache.metadata.may_fill(every := self.policy.summarise_every):
            cache.summarise_last(self.policy.summarised, self.policy.summarise, every)

    def attend(self, query: Tensor, logits: Logits) -> Tensor:
        cache = self.cache()
        found = self.policy.step(query, cache, logits)
        if self.device_cache and found.selected is None:  # all of it comes from the host
            self.device_cache.misses += sum(self.lengths) * cache.pages["key"].shape[2]
        heads, entries = cache.pages["key"].shape[2], 0 if self.index is None else self.index.entries()
        self._last = Reading(self.policy, cache.metadata, found.selected, heads, self._widths, entries)
        return found.output

    def like(self) -> tuple[Tensor | None, Tensor | None]:
        return self._like or (None, None)

    def cache(self) -> LayerCache:
        """What a step sees of this store now."""
        assert self._like is not None
        if self._metadata is None:
            self._metadata = contiguous_metadata(tuple(self.lengths), self._capacity, self._like[0].device)
        elif self._cache is not None and self._cache.metadata is self._metadata:
            return self._cache
        return self.cache_at(self._metadata)

    def cache_at(self, metadata: DecodeMetadata) -> LayerCache:
        """The same with other metadata of its buffers, which steps of fixed shapes have."""
        if self._cache is None:
            tokens = {name: rows.pages for name, rows in self.rows.items()}  # type: ignore[attr-defined]
            summaries = {name: rows.pages for name, rows in self.summaries.items()}
            on_host = {name: self.rows[name] for name in self.policy.offloaded}
            offloaded = Offloaded(on_host, self.device_cache) if self.device_cache else None
            built = {} if self.index is None else self.index.tensors()
            self._cache = LayerCache(tokens, summaries, self.sums, metadata, offloaded, self.index)
            kept = {**tokens, **summaries, **self.sums, **built}
            self._widths = {name: of.shape[-1] * of.element_size() for name, of in kept.items()}
        elif self._cache.metadata is not metadata:
            self._cache = self._cache.at(metadata)
        return self._cache

    def reserve(self, tokens: int) -> None:
        """Room for sequences of so many tokens, in buffers of all that is kept."""
        self._reserve(tokens, {name: rows.view for name, rows in self.rows.items()})

    def bytes_read(self) -> int:
        return 0 if self._last is None else self._last.bytes_read()

    def reading(self) -> Callable[[], int]:
        return self.bytes_read if self._last is None else self._last.bytes_read

    def shared_bytes(self) -> int:
        return self.policy.shared_bytes(self._widths)

    def resident_bytes(self) -> int:
        """On the device: what is offloaded is in `host_bytes`."""
        cached = self.device_cache.nbytes() if self.device_cache else 0
        summaries = sum(rows.nbytes() for rows in self.summaries.values())
        built = {} if self.index is None else self.index.tensors()
        sums = sum(tensor.nbytes for tensor in (*self.sums.values(), *built.values()))
        return super().resident_bytes() + summaries + sums + cached - self.host_bytes()

    def host_bytes(self) -> int:
        return sum(self.rows[name].nbytes() for name in self.policy.offloaded if name in self.rows)

    def read_mask(self) -> Tensor:
        assert self._last is not None
        return self._last.mask()

    def crop(self, tokens: int) -> None:
        self._retreat(tokens)
        self.lengths_changed()
        self._add_up_again()
        if self.index is not None:
            self.index.crop(self.lengths)
            self._cache = None

    def select(self, index: Tensor) -> None:
        super().select(index)
        self._cache = self._metadata = None
        if self.index is not None:
            self.index.reorder(index)
        if self.device_cache:
            self.device_cache.clear()
        for rows in self.summaries.values():
            rows.keep(index)
        self.sums = {name: of.index_select(0, index.to(of.device)) for name, of in self.sums.items()}
        if self.lengths:
            self.lengths_changed()

    def to(self, device: torch.device | str) -> None:
        super().to(device)
        self._cache = self._metadata = None
        if self.index is not None:
            self.index.to(device)
        if self.device_cache:
            self.device_cache.clear()
        if self._like is not None:
            self._like = self._like[0].to(device), self._like[1].to(device)
        for rows in self.summaries.values():
            if rows.tensor is not None:
                rows.tensor = rows.tensor.to(device, non_blocking=True)
        self.sums = {name: of.to(device, non_blocking=True) for name, of in self.sums.items()}

    def adopt(self, full: FullStore) -> None:
        lengths = torch.tensor(full.lengths)
        valid = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
        self._write(full.rows["key"].view, full.rows["value"].view, valid)
        if self.index is not None:
            self._prefilled([0] * len(self.lengths), full.rows["key"].view.device)
        self.seen, self.valid = full.seen, full.valid

    def state(self) -> dict[str, Tensor]:
        """Without what follows from keys and values, where these are kept as they came."""
        state = super().state() | ({} if self.index is None else self.index.state())
        if self.policy.keeps_rows:
            return {name: of for name, of in state.items() if not name.startswith("rows.") or name[5:] in ROWS}
        return state | ({"like.key": self._like[0], "like.value": self._like[1]} if self._like else {})

    def restore(self, state: dict[str, Tensor]) -> None:
        super().restore(state)
        if not self.seen:
            return
        kept = {name: rows.view for name, rows in self.rows.items()}
        if self.policy.keeps_rows:
            kept = dict(self._encoded(kept["key"], kept["value"]))
        else:
            self._like = state["like.key"], state["like.value"]
        self.rows.clear()  # to be made anew, with all that goes with them
        self.sums.clear()
        self._capacity = 0
        self._put(kept, Places(self.lengths, slice(0, max(self.lengths)), None), [0] * len(self.lengths))
        self._add_up_again()
        if self.index is not None:
            self.index.begin(len(self.lengths), kept["key"].device)
            self.index.restore(state, self.rows)
            self._cache = None
        if self.policy.offloaded:  # attention is computed where the state came from
            self.to(state["rows.key"].device)

    def _check(self, saved: Saved) -> None:
        if self.policy.keeps_rows:
            saved.take_tokens(saved.longest)
            if self.index is not None:
                self.index.check(saved)
            return
        heads, *dims = self.policy.fitted_to
        like = [saved.take(f"like.{name}", FLOATS, 0, heads, 0, of) for name, of in zip(ROWS, dims, strict=True)]
        for name, none in self.policy.encode(*like).items():
            shape = saved.rows, none.shape[1], saved.longest, none.shape[3]
            found = saved.take(f"rows.{name}", none.dtype, *shape)
            if name in self.policy.most:
                most = self.policy.most[name]
                require(f"rows.{name}", found <= most, f"0 to {most}")

    def _buffer(self, name: str) -> TokenBuffer:
        return HostPages() if name in self.policy.offloaded else PagedBuffer()

    def _write(self, key: Tensor, value: Tensor, valid: Tensor | None) -> Places:
        before = self.lengths or [0] * key.shape[0]
        places = self._advance(key, valid)
        self._put(self._encoded(key, value), places, before)
        return places

    def _encoded(self, key: Tensor, value: Tensor) -> Mapping[str, Tensor]:
        self._like = self._like or (key[:0, :, :0], value[:0, :, :0])
        return self.policy.encode(key, value)

    def _put(self, new: Mapping[str, Tensor], places: Places, before: list[int]) -> None:
        """Write tokens where they belong, and see to the pages that they fill, of sequences of `before` tokens."""
        if max(self.lengths) > self._capacity or not self.rows:
            self._reserve(max(self.lengths), new)
        self.lengths_changed()
        for name, tensor in new.items():
            self.rows[name].write(tensor, places)
        if self.policy.sums:
            self._add_up(new, places)
        if not self.summaries:
            return
        cache, every = self.cache(), self.policy.summarise_every
        table = cache.metadata.block_table
        ends = [-(-(length // every * every) // PAGE) for length in self.lengths]
        due = [table[row, first // PAGE : end] for row, (first, end) in enumerate(zip(before, ends, strict=True))]
        cache.summarise(torch.cat(due), self.policy.summarised, self.policy.summarise)

    def _add_up(self, new: Mapping[str, Tensor], places: Places) -> None:
        """Add new tokens to the sums."""
        added = self.policy.add_up(new)
        if not self.sums:
            self._cache = None
            self.sums = {name: tensor.new_zeros(*tensor.shape[:2], *tensor.shape[3:]) for name, tensor in added.items()}
        for name, tensor in added.items():
            if not isinstance(places.slots, slice):  # others are padding
                row, token, _ = places.slots
                counted = torch.zeros(tensor.shape[0], tensor.shape[2], dtype=torch.bool, device=tensor.device)
                counted[row, token] = True
                tensor = tensor.masked_fill(~counted.view(tensor.shape[0], 1, -1, *[1] * (tensor.dim() - 3)), 0)
            self.sums[name].add_(tensor.sum(2))

    def _add_up_again(self) -> None:
        """Make the sums anew, of the tokens that are left."""
        if not self.sums:
            return
        valid = self.cache().metadata.valid()
        for name, tensor in self.policy.add_up({name: rows.view for name, rows in self.rows.items()}).items():
            if valid is not None:
                tensor = tensor.masked_fill(~valid.view(len(valid), 1, -1, *[1] * (tensor.dim() - 3)), 0)
            self.sums[name].copy_(tensor.sum(2))

    def _reserve(self, tokens: int, like: Mapping[str, Tensor]) -> None:
        self._cache = self._metadata = None
        for name, tensor in like.items():
            if name not in self.rows:
                self.rows[name] = self._buffer(name)
            self.rows[name].reserve(tokens, tensor)
        key = self.rows["key"].tensor
        assert key is not None
        self._capacity = key.shape[2]
        none = {name: rows.pages[:0] for name, rows in self.rows.items()}  # type: ignore[attr-defined]
        for name, tensor in self.policy.summarise(none).items():
            one = tensor.new_zeros(len(self.lengths), tensor.shape[1], 1, *tensor.shape[2:])
            self.summaries.setdefault(name, SummaryBuffer()).reserve(self._capacity // PAGE, one)

    def lengths_changed(self) -> None:
        """Tell the buffers."""
        longest, self._metadata = max(self.lengths), None
        if self.device_cache:  # what comes in place of tokens that are gone has their slots
            self.device_cache.drop([range(length, self.rows["key"].used) for length in self.lengths])
        for rows in self.rows.values():
            rows.used = longest
        for rows in self.summaries.values():
            rows.used = -(-longest // PAGE)
