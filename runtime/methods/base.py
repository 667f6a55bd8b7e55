"""What a method is to the rest of the runtime: settings that bind to a layer, and a policy of pure functions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...artifacts import Artifact
from ..attention import Logits
from ..kv.pages import DecodeMetadata, LayerCache

if TYPE_CHECKING:
    from ..stores.base import Store


@dataclass(frozen=True)
class Selected:
    """The tokens whose keys and values a step has read."""

    index: Tensor
    """[B, Hkv, G or 1, K] int64, positions in their sequence, none twice among those that are valid."""
    valid: Tensor
    """The same shape, bool: False pads."""


@dataclass(frozen=True)
class Attended:
    """What a step returns."""

    output: Tensor
    """[B, Hq, 1, Dv]"""
    selected: Selected | None
    """None: every token was read, and nothing beside keys and values."""


@dataclass(frozen=True)
class Method(ABC):
    """The user's parameters."""

    @abstractmethod
    def bind(self, layer: int, head_dim: int, artifact: Artifact | None) -> Policy:
        """The method in one layer.

        Raises:
            KvcalError: parameters that mean nothing, or what they need is not in the artifact.
        """

    def build(self, layer: int, head_dim: int, artifact: Artifact | None) -> Callable[[], Store]:
        """What makes an empty cache of one layer, as the methods in `runtime/stores` do."""
        from ..stores.paged import PagedStore

        policy = self.bind(layer, head_dim, artifact)
        return lambda: PagedStore(policy)


class Policy(ABC):
    """A method in one layer: fitted tensors and settings, no state. One object for all caches of a model."""

    offloaded: tuple[str, ...] = ()
    """Names of what is kept on the host, read through `LayerCache.gather` together."""
    cached = 0
    """Of that, tokens per KV head that are cached on the device."""
    fitted_to: tuple[int | None, int | None, int | None] = (None, None, None)
    """KV heads, dimensions of keys and of values that the policy was fitted to; None: any."""
    most: Mapping[str, int] = {}
    """The largest number that what is kept by this name may be, where others would be read out of bounds."""
    keeps_rows = True
    """Whether "key" and "value" are kept as they came, so that everything else can be made from them again."""

    def encode(self, key: Tensor, value: Tensor) -> Mapping[str, Tensor]:
        """All that is kept of tokens, "key" and "value" among it: [B, Hkv, T, …] of [B, Hkv, T, D | Dv].

        It follows from a token alone: whoever moves, shares or takes back a token need not know what it is.
        """
        return {"key": key, "value": value}

    def rows(self, cache: LayerCache) -> tuple[Tensor, Tensor]:
        """(keys [B, Hkv, longest, D], values) of every token, as far as they were kept."""
        return cache.tokens("key"), cache.tokens("value")

    def summarise(self, page: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What is kept of full pages as a whole: [n, Hkv, …] of the tokens in them, [n, PAGE, Hkv, …] by name.

        It follows from the page's tokens alone. Steps read it of pages that are full, and only of those.
        """
        return {}

    @abstractmethod
    def step(self, query: Tensor, cache: LayerCache, logits: Logits) -> Attended:
        """Attend from the last token of every sequence, which the cache holds already.

        Nothing waits for the device, and shapes follow from the host's numbers in `cache.metadata`: what runs eagerly
        is what a CUDA graph captures.

        Args:
            query: [B, Hq, 1, D].
        """

    def row_bytes(self, cache: LayerCache) -> int:
        """Bytes of the key and the value of one token and head, as a step reads them."""
        key, value = cache.pages["key"], cache.pages["value"]
        return key.shape[-1] * key.element_size() + value.shape[-1] * value.element_size()

    def index_bytes(self, metadata: DecodeMetadata) -> int:
        """Bytes that a step reads of what `encode` keeps, of all sequences. Waits for the device."""
        return 0

    def shared_bytes(self) -> int:
        """Bytes that a step reads once for all sequences: maps, codebooks."""
        return 0


@dataclass(frozen=True)
class Reading:
    """What a step has read, without the cache that it read it from."""

    policy: Policy
    metadata: DecodeMetadata
    selected: Selected | None
    heads: int
    """Hkv"""
    row: int
    """Bytes of the key and the value of one token and head."""

    def bytes_read(self) -> int:
        """Of keys and values, and of what the policy keeps beside them. Waits for the device."""
        if self.selected is None:
            return int(self.metadata.seq_lens.sum()) * self.heads * self.row
        index = self.policy.index_bytes(self.metadata) + self.policy.shared_bytes()
        return int(self.selected.valid.sum()) * self.row + index

    def mask(self) -> Tensor:
        """[B, Hkv or Hq, longest] bool: the tokens whose keys and values were read."""
        metadata = self.metadata
        if self.selected is None:
            valid = metadata.positions() < metadata.seq_lens.unsqueeze(1)
            return valid.unsqueeze(1).expand(-1, self.heads, -1)
        index, valid = self.selected.index.flatten(1, 2), self.selected.valid.flatten(1, 2)
        times = torch.zeros(*index.shape[:2], metadata.longest, dtype=torch.int32, device=index.device)
        return times.scatter_add_(2, index, valid.to(torch.int32)) > 0  # sums, since what pads repeats some token
