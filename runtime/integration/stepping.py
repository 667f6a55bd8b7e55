"""A compressed cache that a captured decode step can be replayed on."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicCache

from ..attention import SoftmaxSpec
from ..fixed_step import Clock, FixedStep
from ..store import Store
from .cache import CompressedCache
from .layer import CompressedLayer
from .support import takes_positions

BUCKET = 1024
"""Tokens by which room for sequences grows: after it has grown, steps have new addresses and are captured anew."""


class SteppingLayer(CacheLayerMixin):
    """As CompressedLayer, for one token per sequence and call."""

    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, step: FixedStep, seen: int, writes: bool):
        """
        Args:
            writes: False for a layer that reads what another has written.
        """
        super().__init__()
        self.step, self.seen, self.writes = step, seen, writes
        self.is_initialized = True
        self.last: tuple[Tensor, SoftmaxSpec] | None = None
        """The query of the last step; None before the first."""
        self._new: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The step's store is there already."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._new = (key_states, value_states)
        key = key_states.view_as(key_states)
        key.kvcal_layer = self  # type: ignore[attr-defined]
        return key, value_states

    @torch.no_grad()
    def attend(self, query: Tensor, mask: Tensor | None, spec: SoftmaxSpec) -> Tensor:
        """[B, Hq, 1, D] -> [B, Hq, 1, Dv], the new token taken in."""
        assert self._new is not None
        (key, value), self._new = self._new, None
        if self.writes:
            self.step.write(key, value)
        out = self.step.read(query, spec)
        self.last = query, spec
        return out

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        return self.seen + 1, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.14


class SteppingCache(DynamicCache):
    """Works on the stores of `cache`, which is up to date again after `settle`."""

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, cache: CompressedCache):
        super().__init__(config=cache.call.model().config)  # type: ignore[union-attr]
        self.cache, self.call = cache, cache.call
        first = next(iter(cache.stores.values()))
        device = first.tokens["key"].view.device
        self.clock = Clock(first.lengths, device)
        groups = cache.blueprint.groups
        made = {
            layer: FixedStep(store, self.clock)
            for layer, store in cache.stores.items()
            if groups.storing_of(layer) == layer
        }
        self.steps = list(made.values())
        self.can_go_back = all(method.keeps_all_tokens for method in cache.blueprint.methods.values())
        """Whether tokens that were decoded after all sequences had ended can be taken back."""
        self.unsettled = 0
        """Tokens per sequence that the stores have not counted yet."""
        self.captured = True
        """Whether steps may be replays, which know no numbers of the host but those at their capture."""
        self.layers = [
            SteppingLayer(made[groups.storing_of(layer)], first.seen, layer in made) for layer in cache.stores
        ]

    @staticmethod
    def refusal(cache: CompressedCache) -> str | None:
        """Why a cache cannot be stepped; None: it can."""
        if not takes_positions(cache.call.model()):
            return "the model numbers positions by the length of its cache, which a captured step keeps constant"
        if any(not isinstance(layer, CompressedLayer) for layer in cache.layers):
            return "the model has layers that keep transformers' own cache (sliding windows), which grows by copies"
        for method in cache.blueprint.methods.values():
            if why := method.not_captured():
                return why
        devices = {str(store.tokens["key"].view.device) for store in cache.stores.values()}
        return f"its layers lie on several devices ({', '.join(sorted(devices))})" if len(devices) > 1 else None

    @torch.inference_mode(False)  # the stores outlive the caller's mode, and are written in place
    @torch.no_grad()
    def prepare(self) -> tuple[tuple[int, int], ...]:
        """Do what the host has to do before the next token: grow buffers, and what the stores say is due.

        Returns:
            (address, capacity) of everything that a step touches.
        """
        lengths = self.steps[0].store.lengths
        length = max(lengths) + self.unsettled
        self.clock.told = None if self.captured else (min(lengths) + self.unsettled + 1, length + 1)
        full = length >= self.steps[0].capacity
        if full or any(step.store.due(self.unsettled) for step in self.steps):
            self.settle()
            for step in self.steps:
                step.reserve(-(-(length + 1) // BUCKET) * BUCKET if full else step.capacity)
        return tuple(address for step in self.steps for address in step.store.addresses())

    def changed(self) -> list[Tensor]:
        """Tensors that a step changes besides the slots of the coming token."""
        return [self.clock.lengths, *(tensor for step in self.steps for tensor in step.store.changed_by_step())]

    @torch.inference_mode(False)
    @torch.no_grad()
    def settle(self) -> None:
        """Let the stores count the tokens since the last time."""
        if self.unsettled:
            for step in self.steps:
                step.store.count(self.unsettled)
        self.unsettled = 0

    @torch.inference_mode(False)
    @torch.no_grad()
    def finish(self) -> None:
        """Bring the cache up to date, which goes on from here."""
        self.settle()
        for compressed, layer in zip(self.cache.layers, self.layers, strict=True):
            if layer.last is not None:
                # Computed when asked for: few ask, and the last step may come after all sequences ended, and be undone.
                compressed.reading = partial(_read_by, compressed.store, *layer.last)

    def check_whole(self) -> None:
        """Steps are whole by construction."""

    def check_rotation(self, positions: Tensor | None, tokens: int) -> None:
        """Nothing: the caller has checked all steps beforehand, and reading positions would end a capture."""

    def check_sharing(self, model: Any) -> None:
        self.cache.check_sharing(model)


@torch.inference_mode(False)
@torch.no_grad()
def _read_by(store: Store, query: Tensor, spec: SoftmaxSpec) -> int:
    return store.read_by(query, spec)
