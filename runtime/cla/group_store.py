"""The store of a layer whose tokens are kept relative to those of earlier layers of its group."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from ...artifacts import KvcalError
from ..attention import SoftmaxSpec, causal_attention
from ..kv.buffers import find_places
from ..kv.pages import LayerCache
from ..store import Store


class GroupStore(Store):
    """Of policies that are `grouped`. The stores of `earlier` have taken in the same tokens before."""

    def prefill(
        self, query: Tensor, key: Tensor, value: Tensor, spec: SoftmaxSpec, valid: Tensor | None = None
    ) -> Tensor:
        """As of `Store`, with the new tokens' keys and values as they came: what is kept of them is for later."""
        places = find_places(self.lengths_of(len(key)), key.shape[2], valid, key.device)
        self._take(self.encoded(key, value, valid), valid)
        rows = self.policy.keys_values(self.cache())
        for restored, new in zip(rows, (key, value), strict=True):
            places.put(restored, new)
        rows = rows[0].to(query.dtype), rows[1].to(query.dtype)
        return causal_attention(query, *rows, spec, self._visible(query, valid))

    def append(self, key: Tensor, value: Tensor, valid: Tensor | None = None, revocable: bool = False) -> None:
        self._take(self.encoded(key, value, valid), valid)

    def encoded(self, key: Tensor, value: Tensor, valid: Tensor | None = None) -> dict[str, Tensor]:
        tokens, others = key.shape[2], self.earlier()
        if len(others) != len(self.policy.earlier):
            raise KvcalError(
                f"its tokens are kept relative to those of layers {', '.join(map(str, self.policy.earlier))}: decode "
                "with all of the model's layers"
            )
        self.like = self.like or (key[:0, :, :0], value[:0, :, :0])
        places = find_places(self.lengths_of(len(key)), tokens, valid, key.device)
        earlier = [{name: places.take(buffer.view, tokens) for name, buffer in of.tokens.items()} for of in others]
        return dict(self.policy.encode_after(key, value, places.positions(tokens, key.device), earlier))

    def cache(self) -> LayerCache:
        return dataclasses.replace(super().cache(), earlier=tuple(store.cache() for store in self.earlier()))
