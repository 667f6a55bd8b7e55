"""A layer that reads the store of another: it keeps nothing of its own."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ...artifacts import KvcalError
from ..attention import SoftmaxSpec
from ..store import Store
from .eagerly import eagerly
from .layer import Call, CompressedLayer, Taken, nothing_read, part


class ReadingLayer(CompressedLayer):
    """Attends with its own queries to what the storing layer took in, in the same forward call."""

    def __init__(self, layer_idx: int, storing: CompressedLayer, call: Call):
        CacheLayerMixin.__init__(self)
        self.layer_idx, self._storing, self._call = layer_idx, storing, call
        self._new: tuple[Tensor, Tensor] | None = None
        self.reading = nothing_read
        self.taken: Taken | None = None

    @property
    def store(self) -> Store:
        return self._storing.store

    @eagerly
    def attend(self, query: Tensor, mask: Tensor | None, spec: SoftmaxSpec) -> Tensor:
        assert self._new is not None
        (key, value), self._new = self._new, None
        store, tokens, taken = self.store, key.shape[2], self._storing.taken
        if taken is None or taken.tokens != tokens:
            raise KvcalError(
                f"layer {self.layer_idx} reads the cache of layer {self._storing.layer_idx}, which has not taken in "
                f"these {tokens} tokens: begin a new cache"
            )
        # Guesses are steps that see only earlier tokens: they are cropped, and appended again one by one.
        again = tokens - taken.prompt if tokens > 1 else 0
        if again:
            store.crop(again)
        parts = []
        if taken.prompt:
            new = slice(None, taken.prompt)
            parts.append(store.attend_all(query[:, :, new], spec, part(taken.valid, new)))
        for token in range(taken.prompt, tokens):
            one = slice(token, token + 1)
            one_valid = part(taken.valid, one)
            if again:
                store.append(key[:, :, one], value[:, :, one], one_valid)
            parts.append(self._step(store, query[:, :, one], key[:, :, one], value[:, :, one], spec, one_valid))
        self.taken = taken
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def check_whole(self) -> None:
        """Raises KvcalError when this layer missed what the storing layer last took in."""
        if self.taken is not self._storing.taken:
            raise KvcalError(
                f"a forward call of this cache ended half-way, layer {self.layer_idx} has not read what layer "
                f"{self._storing.layer_idx} took in: begin a new cache"
            )

    def restore(self, state: dict[str, Tensor]) -> None:
        if self.store.seen:
            self._begin(self.store.tokens["key"].view)

    def adopt(self, full: CompressedLayer) -> None:
        self.restore({})

    def reset(self) -> None:
        self._new, self.is_initialized, self.reading, self.taken = None, False, nothing_read, None

    # The storing layer does these once for all that read it.

    def crop(self, tokens_to_remove: int) -> None:
        pass

    def reorder_cache(self, beam_idx: Tensor) -> None:
        pass

    def batch_select_indices(self, indices: Tensor) -> None:
        pass

    def batch_repeat_interleave(self, repeats: int) -> None:
        pass

    def offload(self) -> None:
        pass

    def prefetch(self) -> None:
        pass
