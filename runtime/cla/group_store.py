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
        """As of `Store`, with keys and values as they came of the new tokens, and of the last ones before them."""
        before = self.lengths_of(len(key))
        places = self._take_rows(key, value, valid)
        if any(before):
            rows = self.policy.keys_values(self.cache())
            self.recent.over_all(rows, torch.tensor(before, device=key.device))
        else:
            longest = max(self.lengths)
            rows = (
                key.new_zeros(*key.shape[:2], longest, key.shape[3]),
                value.new_zeros(*value.shape[:2], longest, value.shape[3]),
            )
        for restored, new in zip(rows, (key, value), strict=True):
            places.put(restored, new)
        self._keep_recent(key, value, places)
        return causal_attention(
            query, rows[0].to(query.dtype), rows[1].to(query.dtype), spec, self._visible(query, valid)
        )

    def take(
        self,
        key: Tensor,
        value: Tensor,
        valid: Tensor | None = None,
        received: Tensor | None = None,
        observed: LastQueries | None = None,
    ) -> None:
        self._keep_recent(key, value, self._take_rows(key, value, valid))

    def append(self, key: Tensor, value: Tensor, valid: Tensor | None = None, revocable: bool = False) -> None:
        seen = self.seen
        try:
            places = self._take_rows(key, value, valid)
        except BaseException:  # also Ctrl-C: the token has not come
            if self.seen > seen:
                self._retreat(1)
                self._lengths_changed()
            raise
        self._keep_recent(key, value, places)

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
        self._take(new, valid)
        return places

    def _keep_recent(self, key: Tensor, value: Tensor, places: Places) -> None:
        if not self.recent.rows:
            self.buffers.moved()  # what a step sees tells their widths, too
        self.recent.put(key, value, places)

    # What a step sees, and what is held

    def cache(self) -> LayerCache:
        earlier = tuple(Store.cache(store) for store in self.earlier())  # codes alone, not what these follow
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
