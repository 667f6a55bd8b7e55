"""One attention layer over an engine's pages: tokens are written with all that the method keeps of them; those that
decode take a step of it, prompts attend densely."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ....kernels.pages import PageLayout
from ...attention import SoftmaxSpec
from ...kv.engine_pages import EngineCache, layout_of
from ...kv.pages import DecodeMetadata
from ...methods.base import Policy
from .batch import Batch, Dense


@dataclass(eq=False)
class Layer:
    policy: Policy
    layout: PageLayout
    spec: SoftmaxSpec
    _cache: EngineCache | None = field(default=None, init=False, repr=False)
    """Over the memory that the last call was given."""
    _memory: tuple[int, torch.Size] | None = field(default=None, init=False, repr=False)

    @classmethod
    def of(cls, policy: Policy, heads: int, head_dim: int, dtype: torch.dtype, spec: SoftmaxSpec) -> Layer:
        """
        Args:
            dtype: of the model's keys and values.
        """
        return cls(policy, layout_of(policy, heads, head_dim, head_dim, dtype), spec)

    def forward(
        self, query: Tensor, key: Tensor | None, value: Tensor | None, pieces: Tensor, batch: Batch, output: Tensor,
        dense: Dense | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            query: [T, Hq, D].
            key, value: [T, Hkv, D]; None: another layer has written them.
            pieces: [N, Hkv, bytes of a page and head] uint8, the memory of pages.
            output: [T, Hq, D], written.
            dense: attention of prompts, where the engine has it; None: in torch.
        """
        if batch.decode is not None:
            one = slice(batch.decoding)
            cache = self._over(pieces, batch.decode)
            if key is not None and value is not None:
                self._append(cache, key[one].unsqueeze(2), value[one].unsqueeze(2))
            output[one] = self.policy.step(query[one].unsqueeze(2), cache, self.spec).output.squeeze(2)
        if not batch.prompts:
            return
        cache = self._over(pieces, batch.prompts[0].metadata)
        rest = slice(batch.decoding, batch.tokens)
        if key is not None and value is not None:
            self._take(cache, key[rest], value[rest], batch.slots[rest], batch)
        if dense is not None and (rows := self.rows(cache, query.dtype)) is not None:
            queries = self.policy.query(query[rest].transpose(0, 1).unsqueeze(0))
            dense(queries[0].transpose(0, 1).contiguous(), rows, output[rest])
            return
        for prompt in batch.prompts:
            queries = query[prompt.tokens].transpose(0, 1).unsqueeze(0)
            found = self.policy.attend_all(queries, cache.at(prompt.metadata), self.spec, prompt.limits)
            output[prompt.tokens] = found[0].transpose(0, 1)

    def rows(self, cache: EngineCache, dtype: torch.dtype) -> Tensor | None:
        """[N, Hkv, PAGE, 2 D], each token's key and value one after the other, a view; None: they are not kept so, or
        not in this dtype."""
        key = cache.part("key")
        if key.dtype != dtype or not self.layout.alternating:
            return None
        return key.as_strided((*key.shape[:3], 2 * key.shape[3]), key.stride(), key.storage_offset())

    def _append(self, cache: EngineCache, key: Tensor, value: Tensor) -> None:
        """The last token of each sequence, [B, Hkv, 1, D]."""
        if not self.policy.append(cache, key, value):
            self.policy.write(cache, self.policy.encode(key, value))

    def _take(self, cache: EngineCache, key: Tensor, value: Tensor, slots: Tensor, batch: Batch) -> None:
        """Prompts' tokens [T, Hkv, D], and what is kept of the pages that they fill."""
        key, value = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (key, value))
        cache.write(self.policy.encode(key, value), slots)
        if cache.summaries:
            cache.summarise_written(batch.filled(self.policy.summarise_every))

    def _over(self, pieces: Tensor, metadata: DecodeMetadata) -> EngineCache:
        memory = pieces.data_ptr(), pieces.shape
        if self._cache is None or self._memory != memory:
            self._cache = EngineCache.over(pieces, self.layout, self.policy, metadata)
            self._memory = memory
        return self._cache.at(metadata)
