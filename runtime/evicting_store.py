"""A layer's cache that holds a budget of tokens per sequence and evicts the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..artifacts import KvcalError
from .attention import SoftmaxSpec
from .kv.last_queries import LastQueries
from .kv.layer import LayerBuffers
from .kv.pages import POSITION, DecodeMetadata, LayerCache, SlotBuffer, contiguous_metadata
from .kv.saved import Saved, require
from .methods import KEEPING
from .methods.base import Attended, Reading
from .methods.evicting import Evicted, EvictingPolicy
from .store import Store, gather


class EvictingStore(Store):
    """The tokens of a sequence lie in its first `held` slots, in any order; "position" says which is where."""

    policy: EvictingPolicy

    def __init__(self, policy: EvictingPolicy) -> None:
        super().__init__(policy)
        self._held: list[int] = []
        self._prompt_waits: list[bool] = []
        """Of each sequence, whether tokens have come by prefill since its last decoded one. It need not be saved: it
        matters only to policies that observe, and for these `observed`, which is saved, says the same."""
        self._evicted: Evicted | None = None
        """How many tokens each sequence had lost at the last `reserve`."""
        self._before: list[dict[str, Tensor]] = []
        """The state before each revocable token."""

    @property
    def held(self) -> list[int]:
        return self._held

    # Tokens come

    def append(self, key: Tensor, value: Tensor, valid: Tensor | None = None, revocable: bool = False) -> None:
        if not revocable:
            self.settle()
        else:
            self._before.append({name: tensor.clone() for name, tensor in self.state().items()})
        coming = [True] * len(key) if valid is None else valid[:, 0].tolist()
        new = self.encoded(key, value)
        if self.tokens and any(coming) and (not all(coming) or self._due()):
            self._make_room(coming)
        self._drop_queries(coming)
        if not self.tokens or not all(coming):
            self._write(new, valid)
            return
        self._held = [min(held + 1, most) for held, most in zip(self.held, self._most_held(coming), strict=True)]
        self._prompt_waits = [False] * len(key)
        self._advance(len(key), 1)
        if max(self.held) > self.buffers.capacity:
            self.buffers.reserve(max(self.held), {**new, POSITION: self.tokens[POSITION].view})
        self._lengths_changed()
        self.policy.write(self.cache(), new)
        if self.sequence_index is not None:  # SubGen's takes in what is evicted, and may have grown
            self.buffers.moved()

    def _drop_queries(self, coming: Sequence[bool]) -> None:
        """Drop the last queries of prompts whose tokens were just chosen. Sequences that still wait for their first
        decoded token keep theirs."""
        if self.observed is not None:
            waiting = [not comes and waits for comes, waits in zip(coming, self._prompt_waits, strict=True)]
            self.observed = self.observed.where(waiting) if any(waiting) else None

    def _take(self, new: Mapping[str, Tensor], valid: Tensor | None) -> None:
        self.settle()
        super()._take(new, valid)
        gets = [True] * len(self.lengths) if valid is None else valid.any(1).tolist()
        self._prompt_waits = [waits or got for waits, got in zip(self._prompt_waits or gets, gets, strict=True)]

    def _write(self, new: Mapping[str, Tensor], valid: Tensor | None) -> None:
        batch, heads, tokens = new["key"].shape[:3]
        places = self._places(new["key"], valid)
        position = self._positions(tokens, valid, new["key"].device).to(torch.int32)[:, None, :, None]
        position = position.expand(-1, heads, -1, -1)
        self._held, self._prompt_waits = places.after, self._prompt_waits or [False] * batch
        self._put({**new, POSITION: position}, places, self.lengths)

    # Tokens go

    def make_room(self) -> None:
        every = [True] * len(self.lengths)
        if self.lengths and self._loses_more_than(0):
            self._make_room(every)
            self._drop_queries(every)

    def _most_held(self, coming: Sequence[bool], after: int = 0) -> list[int]:
        """How many tokens each sequence may hold after its next one; for a sequence that gets none one more than it
        holds, so that nothing is evicted.

        Args:
            coming: whether a sequence gets a token.
            after: how many other tokens are decoded before that next one.
        """
        most = []
        for length, held, waits, comes in zip(
            self.lengths, self._held_after(after), self._prompt_waits, coming, strict=True
        ):
            evicted = length + after - held
            allowed = self.policy.most_held(length + after + 1, evicted, waits and not after)
            most.append(allowed if comes else held + 1)
        return most

    def _held_after(self, tokens: int) -> list[int]:
        """How many tokens each sequence holds when so many more have been decoded."""
        if not tokens:
            return self.held
        counts = zip(self.lengths, self.held, strict=True)
        return [self.policy.most_held(length + tokens, length - held, False) for length, held in counts]

    def _due(self, after: int = 0) -> bool:
        """Whether the host has to evict before the next token, because `Policy.write` cannot make the room: it
        overwrites one slot, or none."""
        return self._loses_more_than(1 if self.policy.replaces else 0, after)

    def _loses_more_than(self, count: int, after: int = 0) -> bool:
        """Whether one more token makes a sequence lose more than `count` tokens.

        Args:
            after: as of `_most_held`.
        """
        most = self._most_held([True] * len(self.lengths), after)
        return any(held + 1 - allowed > count for held, allowed in zip(self._held_after(after), most, strict=True))

    def _make_room(self, coming: Sequence[bool]) -> None:
        """Evict the tokens of least worth, so that each sequence that gets a token has room for it."""
        lengths, kept = [length + 1 for length in self.lengths], self._most_held(coming)
        held = [min(now, most - 1) for now, most in zip(self.held, kept, strict=True)]
        self._prompt_waits = [waits and not comes for waits, comes in zip(self._prompt_waits, coming, strict=True)]
        if held == self.held:
            return
        position = self.tokens[POSITION].view.squeeze(-1)
        on_device = [torch.tensor(counts, device=position.device).view(-1, 1, 1) for counts in (lengths, kept, held)]
        worth = self.policy.worth(self.cache(), on_device[0], on_device[1], self.observed)
        worth = worth.masked_fill(position < 0, -torch.inf)
        # Where tokens are of equal worth (SnapKV pools it), the earlier ones stay, whatever their slots.
        order = position.argsort(-1)
        ranked = worth.gather(2, order).argsort(dim=-1, descending=True, stable=True)
        slot = order.gather(2, ranked[:, :, : max(1, *held)])
        stays = (torch.arange(slot.shape[2], device=slot.device) < on_device[2]).expand_as(slot)
        if self.sequence_index is not None:
            self._evict(slot, stays)
        for name, buffer in self.tokens.items():
            staying = gather(buffer.view, slot)
            buffer.replace(staying.masked_fill(~stays.unsqueeze(-1), -1) if name == POSITION else staying)
        self._held = held
        self.buffers.reserve(max(held), {})
        self._lengths_changed()

    def _evict(self, slot: Tensor, stays: Tensor) -> None:
        """Tell the policy which tokens go: all but those in slots [B, Hkv, K] where `stays` [B, Hkv, K] bool."""
        position = self.tokens[POSITION].view.squeeze(-1)
        times = torch.zeros_like(position).scatter_add_(2, slot, stays.to(position.dtype))
        gone = (times == 0) & (position >= 0)
        order = position.masked_fill(~gone, torch.iinfo(position.dtype).max).argsort(-1)
        order = order[:, :, : int(gone.sum(-1).max())]
        self.policy.on_evict(self.cache(), order, gone.gather(2, order))

    def crop(self, tokens: int) -> None:
        if tokens == 0:
            return
        if tokens <= len(self._before):
            self.restore(self._before[-tokens])
            del self._before[-tokens:]
            return
        if self.held != self.lengths or self.accumulates or self.observes:
            raise KvcalError(
                f"{self.policy.name} cannot take back the last {tokens} tokens, which changed what it holds: crop "
                f"works for methods that keep all tokens ({KEEPING}), and for guesses of assisted decoding"
            )
        self._before.clear()
        self._retreat(tokens)
        self._held = list(self.lengths)
        self._lengths_changed()
        position = self.tokens[POSITION]
        assert position.tensor is not None
        past = position.tensor >= torch.tensor(self.lengths, device=position.tensor.device).view(-1, 1, 1, 1)
        position.tensor.masked_fill_(past, -1)

    def settle(self) -> None:
        self._before.clear()

    def reorder(self, order: Tensor) -> None:
        self._before.clear()
        if self.lengths:
            self._held = [self._held[sequence] for sequence in order.tolist()]
            self._prompt_waits = [self._prompt_waits[sequence] for sequence in order.tolist()]
        super().reorder(order)

    def resident_bytes(self) -> int:
        """Includes the states that are kept to take guesses back."""
        return super().resident_bytes() + sum(tensor.nbytes for state in self._before for tensor in state.values())

    # What a step sees

    def _observe_step(self, query: Tensor, spec: SoftmaxSpec, valid: Tensor | None) -> None:
        """Only queries of prompts are kept."""

    def _reading(self, cache: LayerCache, found: Attended) -> Reading:
        """With a copy of the positions: later tokens overwrite them."""
        position = self.tokens[POSITION].view.squeeze(-1).clone()
        return dataclasses.replace(super()._reading(cache, found), position=position)

    def cache(self) -> LayerCache:
        if self._metadata is None:
            held, lengths, device = tuple(self.held), tuple(self.lengths), self.tokens["key"].view.device
            self._metadata = contiguous_metadata(held, self.buffers.capacity, device, lengths)
        return super().cache()

    def _buffers(self) -> LayerBuffers:
        return LayerBuffers(self.policy, lambda name: SlotBuffer(fill=-1 if name == POSITION else 0))

    # Steps of fixed shapes

    def held_metadata(self, metadata: DecodeMetadata) -> DecodeMetadata:
        assert self._evicted is not None
        return self.policy.held_metadata(metadata, self._evicted)

    def due(self, tokens: int) -> bool:
        return self._due(tokens)

    def reserve(self, tokens: int) -> None:
        if self._due():
            self._make_room([True] * len(self.lengths))
        evicted = tuple(length - held for length, held in zip(self.lengths, self.held, strict=True))
        device = torch.tensor(evicted, dtype=torch.int32, device=self.tokens["key"].view.device)
        known = None if self._evicted is None else self._evicted.device
        if known is not None and (known.shape, known.device) == (device.shape, device.device):
            device = known.copy_(device)  # a captured step has its address
        self._evicted = Evicted(evicted, device)
        super().reserve(self.policy.most_slots(tokens, self._evicted))

    def count(self, tokens: int) -> None:
        self._held = self._held_after(tokens)
        if tokens:
            self._drop_queries([True] * len(self.held))
        self._prompt_waits = [False] * len(self.held)
        super().count(tokens)

    def changed_by_step(self) -> list[Tensor]:
        """Also the token buffers, where a new token overwrites another's slot."""
        return self.buffers.tensors() if self.policy.replaces else super().changed_by_step()

    # Saved caches

    def state(self) -> dict[str, Tensor]:
        """Tokens in order of position; free slots are zero, of position -1."""
        state = {**super().state(), "held": torch.tensor(self.held, dtype=torch.int64)}
        if not self.lengths:
            return state
        position = self.tokens[POSITION].view.squeeze(-1)
        free = position < 0
        order = position.masked_fill(free, torch.iinfo(torch.int32).max).argsort(-1)
        for name, buffer in self.tokens.items():
            ordered = gather(buffer.view, order)
            state[f"tokens.{name}"] = ordered.masked_fill(
                free.gather(2, order).unsqueeze(-1), -1 if name == POSITION else 0
            )
        return state

    def _is_saved(self, name: str) -> bool:
        return True

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._held = state["held"].tolist()
        super().restore(state)
        self.observes = self.policy.observes
        waiting = None if self.observed is None else (self.observed.position >= 0).any(1)
        self._prompt_waits = [False] * len(self._held) if waiting is None else waiting.tolist()

    def _check(self, saved: Saved) -> None:
        saved.take_tokens(None)
        slots = saved.key.shape[2]
        saved.held = held = saved.counts("held", saved.lengths)
        if slots < max(held) or slots > max(1, *held):
            raise KvcalError(f"tokens.key: {slots} slots, the row that holds most has {max(held)} tokens")
        # At least: after `make_room` a sequence holds one token less than its budget allows.
        enough = [min(length, self.policy.least_held(length)) for length in saved.lengths]
        require("held", torch.tensor(held) >= torch.tensor(enough), "at least the budget of the row")
        position = saved.take("tokens.position", torch.int32, *saved.key.shape[:3], 1).squeeze(-1)
        free = (torch.arange(slots) >= torch.tensor(held).unsqueeze(1)).unsqueeze(1)
        last = torch.tensor(saved.lengths).view(-1, 1, 1) - 1
        require("position", torch.where(free, position == -1, (position >= 0) & (position <= last)), "-1 where free")
        require("position", (position[..., 1:] > position[..., :-1]) | free[..., 1:], "in order")
        newest = position.amax(-1, keepdim=True) if slots else last
        none = (torch.tensor(held) == 0).view(-1, 1, 1)
        require("position", (newest == last) | none, "the row's last token among those held")
        self.policy.check_held(saved, position, held)
        if self.observes:
            LastQueries.check(saved, self.observes)
        if self.sequence_index is not None:
            self.sequence_index.check(saved)
