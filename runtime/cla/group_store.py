"""The store of a layer whose tokens are kept relative to those of earlier layers of its group."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from ...artifacts import KvcalError
from ..attention import SoftmaxSpec, causal_attention
from ..kv.buffers import Places, find_places
from ..kv.last_queries import LastQueries
from ..kv.pages import LayerCache
from ..kv.recent import RecentRows
from ..kv.saved import Saved
from ..methods.base import Policy
from ..store import Store


class GroupStore(Store):
    """Of policies that are `grouped`. The stores of `earlier` have taken in the same tokens before; the last
    `recent_rows` tokens are held as they came, too."""

    def __init__(self, policy: Policy):
        super().__init__(policy)
        self.recent = RecentRows(policy.recent_rows)

    # Tokens come

    def prefill(
        self, query: Tensor, key: Tensor, value: Tensor, spec: SoftmaxSpec, valid: Tensor | None = None
    ) -> Tensor:
        """As of `Store`, with the new tokens' keys and values as they came: what is kept of them is for later."""
        places = self._take_rows(key, value, valid)
        rows = self.policy.keys_values(self.cache())
        for restored, new in zip(rows, (key, value), strict=True):
            places.put(restored, new)
        rows = rows[0].to(query.dtype), rows[1].to(query.dtype)
        return causal_attention(query, *rows, spec, self._visible(query, valid))

    def take(
        self,
        key: Tensor,
        value: Tensor,
        valid: Tensor | None = None,
        received: Tensor | None = None,
        observed: LastQueries | None = None,
    ) -> None:
        self._take_rows(key, value, valid)

    def append(self, key: Tensor, value: Tensor, valid: Tensor | None = None, revocable: bool = False) -> None:
        self._take_rows(key, value, valid)

    def _take_rows(self, key: Tensor, value: Tensor, valid: Tensor | None) -> Places:
        """Take in T tokens; returns where they lie."""
        tokens, others = key.shape[2], self.earlier()
        if len(others) != len(self.policy.earlier):
            raise KvcalError(
                f"its tokens are kept relative to those of layers {', '.join(map(str, self.policy.earlier))}: decode "
                "with all of the model's layers"
            )
        self.like = self.like or (key[:0, :, :0], value[:0, :, :0])
        places = find_places(self.lengths_of(len(key)), tokens, valid, key.device)
        earlier = [
            {name: places.take(buffer.view.to(key.device), tokens) for name, buffer in other.tokens.items()}
            for other in others
        ]
        new = self.policy.encode_after(key, value, places.positions(tokens, key.device), earlier)
        self.recent.put(key, value, places)
        self._take(new, valid)
        return places

    # What a step sees, and what is held

    def cache(self) -> LayerCache:
        earlier = tuple(store.cache() for store in self.earlier())
        return dataclasses.replace(super().cache(), earlier=earlier, recent=self.recent)

    def _built(self) -> Mapping[str, Tensor]:
        return self.recent.state()

    # Tokens go

    def crop(self, tokens: int) -> None:
        super().crop(tokens)
        self.recent.crop(self.lengths)

    def reorder(self, order: Tensor) -> None:
        super().reorder(order)
        if self.lengths:
            self.recent.reorder(order)

    def to(self, device: torch.device | str) -> None:
        super().to(device)
        self.recent.to(device)

    # Saved caches

    def state(self) -> dict[str, Tensor]:
        return super().state() | self.recent.state()

    def _check(self, saved: Saved) -> None:
        super()._check(saved)
        self.recent.check(saved)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.recent = RecentRows(self.policy.recent_rows)
        if state["valid"].shape[1]:
            self.recent.restore(state)
        super().restore(state)
