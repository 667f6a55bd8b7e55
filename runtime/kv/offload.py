"""Keys and values in host memory, with a bounded cache on the device of those that were read last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .buffers import CHUNK, Places, TokenBuffer


def on_host(places: Places) -> Places:
    """The same places, their tensors on the CPU."""
    slots = places.slots if isinstance(places.slots, slice) else tuple(part.cpu() for part in places.slots)
    return Places(places.after, slots)  # type: ignore[arg-type]


class DeviceCache:
    """Tokens of a layer on the device, per (sequence, KV head); those read longest ago make room for new ones."""

    def __init__(self, capacity: int):
        """
        Args:
            capacity: tokens; exceeded only when one step reads more. No room is made for more than the host holds.
        """
        self.capacity = capacity
        self.hits = self.misses = 0
        """Tokens that steps needed: found here, and copied from the host."""
        self._held: dict[str, Tensor] = {}
        """[B, Hkv, capacity, D] by name."""
        self._slot_of = self._token_in = self._last_used = torch.empty(0)
        self._step = 0

    def gather(self, host: dict[str, TokenBuffer], index: Tensor, counted: Tensor | None) -> dict[str, Tensor]:
        """The tokens at positions `index` [B, Hkv, G or 1, k]; those that are not here are copied from the host first.

        Returns:
            [B, Hkv, G or 1, k, D] for each of `host`.
        """
        self._step += 1
        tokens = max(buffer.used for buffer in host.values())
        self._prepare(host, index, tokens)
        needed = torch.zeros(*index.shape[:2], tokens, dtype=torch.int32, device=index.device)
        flat = index.flatten(2)
        ones = torch.ones_like(flat) if counted is None else counted.expand_as(index).flatten(2)
        needed = needed.scatter_add_(2, flat, ones.to(torch.int32)) > 0
        self._make_room(max(int(needed.sum(-1).max()), min(self.capacity, tokens)))
        cached = self._slot_of[:, :, :tokens] >= 0
        self.hits += int((needed & cached).sum())
        missing = needed & ~cached
        self._touch(needed & cached)
        self._copy(host, missing)
        slot = self._slot_of.gather(2, flat).clamp_min(0).view_as(index)
        batch = torch.arange(index.shape[0], device=index.device).view(-1, 1, 1, 1)
        heads = torch.arange(index.shape[1], device=index.device).view(1, -1, 1, 1)
        return {name: self._held[name][batch, heads, slot] for name in host}

    def drop(self, slots: Sequence[range]) -> None:
        """Forget what is cached of these slots of each sequence, because the host will hold other tokens there."""
        if not self._held:
            return
        for sequence, dropped in enumerate(slots):
            gone = self._slot_of[sequence, :, dropped.start : dropped.stop]
            head, token = (gone >= 0).nonzero(as_tuple=True)
            slot = gone[head, token]
            self._token_in[sequence, head, slot] = self._last_used[sequence, head, slot] = -1
            gone.fill_(-1)

    def clear(self) -> None:
        """Forget everything."""
        self._held = {}

    def nbytes(self) -> int:
        if not self._held:
            return 0
        bookkeeping = (self._slot_of, self._token_in, self._last_used)
        return sum(tensor.nbytes for tensor in (*self._held.values(), *bookkeeping))

    def _prepare(self, host: dict[str, TokenBuffer], index: Tensor, tokens: int) -> None:
        batch, heads, device = index.shape[0], index.shape[1], index.device
        if not self._held:
            room = min(self.capacity, -(-tokens // CHUNK) * CHUNK)
            for name, buffer in host.items():
                view = buffer.view
                self._held[name] = view.new_zeros(batch, heads, room, view.shape[3], device=device)
            self._slot_of = torch.full((batch, heads, tokens), -1, dtype=torch.int64, device=device)
            self._token_in = torch.full((batch, heads, room), -1, dtype=torch.int64, device=device)
            self._last_used = torch.full((batch, heads, room), -1, dtype=torch.int64, device=device)
        self._slot_of = _grown(self._slot_of, tokens)

    def _make_room(self, tokens: int) -> None:
        if tokens > self._token_in.shape[2]:
            tokens = max(tokens, min(self.capacity, -(-tokens // CHUNK) * CHUNK))
            self._token_in, self._last_used = _grown(self._token_in, tokens), _grown(self._last_used, tokens)
            for name, held in self._held.items():
                grown = held.new_zeros(*held.shape[:2], tokens, held.shape[3])
                grown[:, :, : held.shape[2]] = held
                self._held[name] = grown

    def _touch(self, tokens: Tensor) -> None:
        """Mark `tokens` [B, Hkv, tokens] bool, all of them cached, as read by this step."""
        sequence, head, token = tokens.nonzero(as_tuple=True)
        self._last_used[sequence, head, self._slot_of[sequence, head, token]] = self._step

    def _copy(self, host: dict[str, TokenBuffer], missing: Tensor) -> None:
        sequence, head, token = missing.nonzero(as_tuple=True)
        self.misses += len(sequence)
        ordinal = (missing.cumsum(-1) - 1)[sequence, head, token]
        slot = self._last_used.argsort(dim=-1, stable=True)[sequence, head, ordinal]
        replaced = self._token_in[sequence, head, slot]
        occupied = replaced >= 0
        self._slot_of[sequence[occupied], head[occupied], replaced[occupied]] = -1
        self._slot_of[sequence, head, token] = slot
        self._token_in[sequence, head, slot] = token
        self._last_used[sequence, head, slot] = self._step
        for name, buffer in host.items():
            view = buffer.view
            copied = view[sequence.to(view.device), head.to(view.device), token.to(view.device)]
            self._held[name][sequence, head, slot] = copied.to(self._held[name].device, non_blocking=True)


@dataclass(frozen=True)
class Offloaded:
    """A layer's buffers on the host, all read at the same positions, and the device's cache of their tokens."""

    buffers: dict[str, TokenBuffer]
    cache: DeviceCache

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.buffers)

    def gather(self, names: Sequence[str], index: Tensor, valid: Tensor | None) -> list[Tensor]:
        """[B, Hkv, K, …] of each name, on the device of `index` [B, Hkv, K]."""
        counted = None if valid is None else valid.unsqueeze(2)
        gathered = self.cache.gather(self.buffers, index.unsqueeze(2), counted)
        return [gathered[name].squeeze(2) for name in names]


def _grown(bookkeeping: Tensor, size: int) -> Tensor:
    missing = size - bookkeeping.shape[2]
    return torch.nn.functional.pad(bookkeeping, (0, missing), value=-1) if missing > 0 else bookkeeping
