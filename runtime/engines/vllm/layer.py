"""One attention layer over an engine's pages: tokens are written with all that the method keeps of them; those that
decode take a step of it, prompts attend densely."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ....kernels.pages import PAGE, PageLayout
from ...attention import SoftmaxSpec
from ...kv.engine_pages import EngineCache, layout_of
from ...kv.pages import DecodeMetadata
from ...methods.base import Policy
from .batch import Batch, batch_of

PromptAttention = Callable[[Tensor, Tensor, Tensor], None]
"""Attends from the queries of a batch's prompts [T, Hq, D] to keys and values in pages [N, Hkv, PAGE, 2 D], and writes
the output [T, Hq, D]."""


@dataclass(eq=False)
class Layer:
    policy: Policy
    layout: PageLayout
    spec: SoftmaxSpec
    heads: int
    """Hkv"""
    head_dim: int
    dtype: torch.dtype
    """Of the model's keys and values."""
    _cache: EngineCache | None = field(default=None, init=False, repr=False)
    """Over the memory that the last call was given."""
    _memory: tuple[object, ...] = field(default=(), init=False, repr=False)

    @classmethod
    def of(cls, policy: Policy, heads: int, head_dim: int, dtype: torch.dtype, spec: SoftmaxSpec) -> Layer:
        return cls(policy, layout_of(policy, heads, head_dim, head_dim, dtype), spec, heads, head_dim, dtype)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, pieces: Tensor, batch: Batch, output: Tensor,
        prompt_attention: PromptAttention | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            query: [T, Hq, D].
            key, value: [T, Hkv, D].
            pieces: [N, Hkv, bytes of a page and head] uint8, the memory of pages.
            output: [T, Hq, D], written.
            prompt_attention: the engine's own; None: prompts attend in torch.
        """
        if batch.decode is not None:
            one = batch.decoded
            cache = self._over(pieces, batch.decode)
            self._append(cache, key[one].unsqueeze(2), value[one].unsqueeze(2))
            output[one] = self.policy.step(query[one].unsqueeze(2), cache, self.spec).output.squeeze(2)
        if not batch.prompts:
            return
        cache, new = self._over(pieces, batch.prompts[0].metadata), batch.prompted
        self._take(cache, key[new], value[new], batch.slots[new], batch)
        rows = self.rows(cache, query.dtype)
        if prompt_attention is not None and rows is not None:
            queries = self.policy.query(query[new].transpose(0, 1).unsqueeze(0))[0].transpose(0, 1)
            found = torch.empty_like(output[new])
            prompt_attention(queries.contiguous(), rows, found)
            output[new] = found
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

    def warm_up(self, query_heads: int, longest: int, device: torch.device) -> None:
        """Take a step over memory of its own, with the shapes of contexts of `longest` tokens: kernels are compiled,
        and what they make of calibrated tensors is made, before there are requests or graphs."""
        pieces = torch.zeros(1, self.heads, self.layout.nbytes, dtype=torch.uint8, device=device)
        table = torch.zeros(1, -(-longest // PAGE), dtype=torch.int32, device=device)
        one, nowhere = torch.ones(1, dtype=torch.int32, device=device), torch.zeros(1, dtype=torch.int64, device=device)
        batch = batch_of([0, 1], [1], [], one, table, nowhere, longest=longest)
        query, key, value = (
            torch.zeros(1, heads, self.head_dim, dtype=self.dtype, device=device)
            for heads in (query_heads, self.heads, self.heads)
        )
        self.forward(query, key, value, pieces, batch, torch.empty_like(query))
        self._cache, self._memory = None, ()

    def _append(self, cache: EngineCache, key: Tensor, value: Tensor) -> None:
        """The last token of each sequence, [B, Hkv, 1, D]."""
        if not self.policy.append(cache, key, value):
            self.policy.write(cache, self.policy.encode(key, value))

    def _take(self, cache: EngineCache, key: Tensor, value: Tensor, slots: Tensor, batch: Batch) -> None:
        """Prompts' tokens [T, Hkv, D], and what is kept of the pages that they fill."""
        key, value = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (key, value))
        cache.write(self.policy.encode(key, value), slots)
        if cache.summaries and len(filled := batch.filled(self.policy.summarise_every)):
            cache.summarise(filled, self.policy.summarised, self.policy.summarise)

    def _over(self, pieces: Tensor, metadata: DecodeMetadata) -> EngineCache:
        memory = pieces.data_ptr(), pieces.shape, pieces.stride()
        if self._cache is None or self._memory != memory:
            self._cache = EngineCache.over(pieces, self.layout, self.policy, metadata)
            self._memory = memory
        return self._cache.at(metadata)
