"""What a method is to the rest of the runtime: settings that bind to a layer, and a policy of pure functions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...artifacts import Artifact
from ..attention import Logits, causal_attention
from ..kv.buffers import TokenBuffer
from ..kv.pages import PAGE, DecodeMetadata, LayerCache
from ..kv.saved import Saved


@dataclass(frozen=True)
class Selected:
    """The tokens whose keys and values a step has read."""

    index: Tensor
    """[B, Hkv, G or 1, K] int64, positions in their sequence, none twice among those that are valid."""
    valid: Tensor
    """The same shape, bool: False pads."""
    pads: bool = True
    """False: all are valid, as the host knows."""


@dataclass(frozen=True)
class Attended:
    """What a step returns."""

    output: Tensor
    """[B, Hq, 1, Dv]"""
    selected: Selected | None
    """None: every token that is held was read."""
    received: Tensor | None = None
    """[B, Hkv, longest] float32: the attention that each token has received, added over a KV head's query heads; None:
    nobody asked."""


Widths = Mapping[str, int]
"""Bytes by name: of one KV head's entry of a token, of a page, or of a sequence."""


@dataclass(frozen=True)
class Method(ABC):
    """The user's parameters."""

    keep_shapes_cache: ClassVar[bool] = False
    """Whether what a cache holds depends on how many tokens a step reads."""
    keeps_all_tokens: ClassVar[bool] = True
    """Whether every token stays, so that any later query can read it."""
    query_aware: ClassVar[bool] = False
    """Whether what it forgets after a prompt is meant to be chosen by the question that the prompt ends in."""
    shared_defaults: ClassVar[Mapping[str, object]] = {}
    """Parameters that are other by default where layers share keys and values."""

    @abstractmethod
    def bind(self, layer: int, head_dim: int, artifact: Artifact | None) -> Policy:
        """The method in one layer.

        Raises:
            KvcalError: parameters that mean nothing, or what they need is not in the artifact.
        """

    def not_captured(self) -> str | None:
        """Why a CUDA graph cannot hold its step; None: it can."""
        return None

    def not_shared(self) -> str | None:
        """Why layers with queries of their own cannot read one cache of it, and what to take; None: they can."""
        return None

    def check_changed_keys(self, layer: int, bases: Mapping[str, Tensor]) -> None:  # noqa: B027 (most need nothing)
        """The keys of this layer are others than those that the artifact was fitted to.

        Args:
            bases: of these keys, named as in the stage `pca`.

        Raises:
            KvcalError: it needs something of these keys that is not there.
        """


class SequenceIndex(ABC):
    """What is built over whole sequences when the host says so, and does not follow from their tokens one by one: the
    part of a policy that has a state, one object for each cache. Steps read its tensors.

    Throughout, lengths are tokens of each sequence, and buffers the token buffers "key" and "value" of what is kept.
    """

    def begin(self, sequences: int, device: torch.device) -> None:  # noqa: B027
        """Get ready for a batch of so many sequences on this device."""

    def prefilled(  # noqa: B027
        self, before: Sequence[int], after: Sequence[int], buffers: Mapping[str, TokenBuffer]
    ) -> None:
        """Sequences went from `before` to `after` tokens by prefill."""

    def due(self, lengths: Sequence[int]) -> bool:
        """Whether `build` has something to do before the next token of these sequences."""
        return False

    def build(  # noqa: B027
        self, lengths: Sequence[int], coming: Sequence[bool], buffers: Mapping[str, TokenBuffer]
    ) -> None:
        """See to what is due.

        Args:
            coming: whether a sequence gets a token now.
        """

    def crop(self, lengths: Sequence[int]) -> None:  # noqa: B027
        """Sequences have no more tokens than these."""

    @abstractmethod
    def reorder(self, index: Tensor) -> None:
        """Keep the sequences `index` [B'], in that order, repeats allowed."""

    @abstractmethod
    def to(self, device: torch.device | str) -> None: ...

    def reserve(self, tokens: int, lengths: Sequence[int]) -> None:  # noqa: B027
        """Make room for what sequences that grow to so many tokens may need."""

    @abstractmethod
    def tensors(self) -> Mapping[str, Tensor]:
        """All that is held, [B, Hkv, …]; what lies at other addresses after `reserve` or `build` makes steps new."""

    @abstractmethod
    def entries(self) -> int:
        """How many there are, of all sequences, per KV head."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """What has to be saved of it."""

    @abstractmethod
    def check(self, saved: Saved) -> None:
        """Raises KvcalError: no such state goes with these tokens."""

    @abstractmethod
    def restore(self, state: Mapping[str, Tensor], buffers: Mapping[str, TokenBuffer]) -> None: ...


class Policy(ABC):
    """A method in one layer: fitted tensors and settings, no state. One object for all caches of a model."""

    accumulates = False
    """Whether a cache adds up what each token receives of all attention (`RECEIVED`)."""
    observes = 0
    """How many of a prompt's last queries a cache keeps until the first decoded token."""

    offloaded: tuple[str, ...] = ()
    """Names of what is kept on the host, read through `LayerCache.gather` together."""
    cached = 0
    """Of that, tokens per KV head that are cached on the device."""
    fitted_to: tuple[int | None, int | None, int | None] = (None, None, None)
    """KV heads, dimensions of keys and of values that the policy was fitted to; None: any."""
    most: Mapping[str, int] = {}
    """The largest number that what is kept by this name may be, where others would be read out of bounds."""
    keeps_keys_values = True
    """Whether "key" and "value" are kept as they came, so that everything else can be made from them again."""

    def index(self) -> SequenceIndex | None:
        """A new one, for a cache; None: all that is kept follows from tokens."""
        return None

    def encode(self, key: Tensor, value: Tensor) -> Mapping[str, Tensor]:
        """All that is kept of tokens, "key" and "value" among it: [B, Hkv, T, …] of [B, Hkv, T, D | Dv].

        It follows from a token alone: whoever moves, shares or takes back a token need not know what it is.
        """
        return {"key": key, "value": value}

    def keys_values(self, cache: LayerCache) -> tuple[Tensor, Tensor]:
        """(keys [B, Hkv, longest, D], values) of every token, as far as they were kept."""
        return cache.tokens("key"), cache.tokens("value")

    def query(self, query: Tensor) -> Tensor:
        """[B, Hq, T, D] -> the same, as it meets the keys of `keys_values`: of the same dot products."""
        return query

    def attend_all(self, query: Tensor, cache: LayerCache, logits: Logits, limits: Tensor | None) -> Tensor:
        """[B, Hq, T, Dv]: dense attention of the T tokens that came last, queries [B, Hq, T, D].

        Args:
            limits: [B, T] int64, of how many tokens each sees; None: all are there, plainly causal.
        """
        key, value = (of.to(query.dtype) for of in self.keys_values(cache))
        return causal_attention(self.query(query), key, value, logits, limits)

    def write(self, cache: LayerCache, new: Mapping[str, Tensor]) -> None:
        """Put all that is kept of each sequence's last token, [B, Hkv, 1, …] by name, where it belongs.

        Where the method is captured, nothing waits for the device.
        """
        if self.sums:
            cache.add_last(self.add_up(new))
        cache.write_last(new)
        if cache.summaries and cache.metadata.may_fill(self.summarise_every):
            cache.summarise_last(self.summarised, self.summarise, self.summarise_every)

    def summarise(self, page: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What is kept of pages as a whole: [n, Hkv, …] of the tokens in them, [n, PAGE, Hkv, …] by name.

        It follows from the page's tokens alone, of the names in `summarised`. It is made again whenever
        `summarise_every` more of them are there, and steps read only what does not depend on those still to come.
        """
        return {}

    summarised: tuple[str, ...] = ("key", "value")
    """Names of what is kept of tokens that `summarise` takes."""
    summarise_every = PAGE
    """Tokens; they divide a page."""

    sums: tuple[str, ...] = ()
    """Names of what `add_up` gives."""

    def add_up(self, kept: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What is kept of a sequence as a whole: the sums over its tokens of what this gives, [B, Hkv, T, …] float32
        by name, of all that is kept of tokens, likewise."""
        return {}

    @abstractmethod
    def step(self, query: Tensor, cache: LayerCache, logits: Logits) -> Attended:
        """Attend from the last token of every sequence, which the cache holds already.

        Where the method is captured, nothing waits for the device, and shapes follow from the host's numbers in
        `cache.metadata`: what runs eagerly is what a CUDA graph captures.

        Args:
            query: [B, Hq, 1, D].
        """

    def token_bytes(self, widths: Widths) -> int:
        """Bytes that a step reads of one token and KV head that it has selected."""
        return widths["key"] + widths["value"]

    def tokens_read(self, selected: Selected) -> Tensor:
        """[] int64: how many times a step reads that much."""
        return selected.valid.sum()

    def index_bytes(self, reading: Reading) -> int:
        """Bytes that a step reads besides to select, of all sequences. Waits for the device."""
        return 0

    def shared_bytes(self, widths: Widths) -> int:
        """Bytes that such a step reads once for all sequences: maps, codebooks."""
        return 0

    def dense_bytes(self, reading: Reading) -> int:
        """All that a step reads which reads every token that is held. Waits for the device."""
        return reading.tokens() * reading.heads * (reading.widths["key"] + reading.widths["value"])


@dataclass(frozen=True)
class Reading:
    """What a step has read, without the cache that it read it from."""

    policy: Policy
    metadata: DecodeMetadata
    selected: Selected | None
    heads: int
    """Hkv"""
    widths: Widths
    entries: int
    """Of the sequence index."""
    position: Tensor | None = None
    """[B, Hkv, slots] int32: the position of the token in each slot, -1 where there is none; None: it is the slot."""

    def tokens(self) -> int:
        """That are held, of all sequences. Waits for the device."""
        return int(self.metadata.seq_lens.sum())

    def bytes_read(self) -> int:
        """Of keys and values, and of what the policy keeps beside them. Waits for the device."""
        policy, widths = self.policy, self.widths
        if self.selected is None:
            return policy.dense_bytes(self)
        chosen = int(policy.tokens_read(self.selected)) * policy.token_bytes(widths)
        return chosen + policy.index_bytes(self) + policy.shared_bytes(widths)

    def mask(self) -> Tensor:
        """[B, Hkv or Hq, longest] bool: the tokens whose keys and values were read."""
        metadata = self.metadata
        if self.position is not None:
            assert metadata.whole is not None
            held = self.position >= 0
            times = held.new_zeros(*held.shape[:2], metadata.whole.longest, dtype=torch.int32)
            return times.scatter_add_(2, self.position.clamp_min(0).long(), held.to(torch.int32)) > 0
        if self.selected is None:
            valid = metadata.positions() < metadata.seq_lens.unsqueeze(1)
            return valid.unsqueeze(1).expand(-1, self.heads, -1)
        index, valid = self.selected.index.flatten(1, 2), self.selected.valid.flatten(1, 2)
        times = torch.zeros(*index.shape[:2], metadata.longest, dtype=torch.int32, device=index.device)
        return times.scatter_add_(2, index, valid.to(torch.int32)) > 0  # sums, since what pads repeats some token
