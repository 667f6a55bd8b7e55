"""The interface of a method: settings (`Method`) that bind to a layer and give a `Policy`, of pure functions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...artifacts import Artifact
from ..attention import SoftmaxSpec, causal_attention
from ..kv.buffers import TokenBuffer
from ..kv.pages import PAGE, DecodeMetadata, LayerCache
from ..kv.saved import Saved


@dataclass(frozen=True)
class Selected:
    """The tokens whose keys and values a step has read."""

    index: Tensor
    """[B, Hkv, G or 1, K] int64, positions in their sequence, none twice among those that are valid."""
    valid: Tensor
    """The same shape, bool: False marks padding."""
    padded: bool = True
    """Whether there may be padding; False where the host knows that all entries are valid."""

    def count(self) -> Tensor:
        """[] int64: how many tokens, over all sequences and heads."""
        return self.valid.sum()

    def mask(self, longest: int) -> Tensor:
        """[B, Hkv or Hq, longest] bool."""
        index, valid = self.index.flatten(1, 2), self.valid.flatten(1, 2)
        times = torch.zeros(*index.shape[:2], longest, dtype=torch.int32, device=index.device)
        # Sums, not a plain scatter: padding names token 0, too, and would unset it.
        return times.scatter_add_(2, index, valid.to(torch.int32)) > 0


@dataclass(frozen=True)
class Marked:
    """The same, as a mark of every token."""

    read: Tensor
    """[B, Hkv, G or 1, longest] bool."""

    def count(self) -> Tensor:
        return self.read.sum()

    def mask(self, longest: int) -> Tensor:
        assert longest == self.read.shape[-1]
        return self.read.flatten(1, 2)


@dataclass(frozen=True)
class Attended:
    """What a step returns."""

    output: Tensor
    """[B, Hq, 1, Dv]"""
    selected: Selected | Marked | None
    """None: every token that is held was read."""
    received: Tensor | None = None
    """[B, Hkv, longest] float32: the attention that each token receives in this step, added over a KV head's query
    heads; None: it was not asked for."""


Widths = Mapping[str, int]
"""Bytes in one KV head, by name: of a token buffer those of a token, of a summary those of a page, of a sum or a tensor
of the sequence index those of its last dimension."""


@dataclass(frozen=True)
class Method(ABC):
    """A method as the user names it, with its parameters."""

    keep_shapes_cache: ClassVar[bool] = False
    """Whether what a cache holds beside keys and values depends on `keep`, so that it cannot serve another `keep`."""
    keeps_all_tokens: ClassVar[bool] = True
    """Whether every token stays, so that any later query can read it."""
    in_numba: ClassVar[bool] = False
    """Whether a CPU runs its step in numba, where that is installed."""
    query_aware: ClassVar[bool] = False
    """Whether the tokens that it evicts after a prompt are meant to be chosen by the question at the prompt's end."""
    planning_bases: ClassVar[Sequence[Mapping[str, object]]] = ()
    """Choices of basis, as parameters. They read nearly as many bytes, so `calibrate plan` takes the best of each
    layer before it compares the settings of `planning_grid`."""
    shared_defaults: ClassVar[Mapping[str, object]] = {}
    """Parameters whose defaults differ where layers share keys and values, with those defaults."""

    @abstractmethod
    def bind(self, layer: int, head_dim: int, artifact: Artifact | None) -> Policy:
        """The method in one layer.

        Raises:
            KvcalError: invalid parameters, or the artifact lacks what they need.
        """

    @classmethod
    def planning_grid(cls, head_dim: int, keeps: Sequence[float]) -> Sequence[Mapping[str, Any]]:
        """Parameters of one layer among which `calibrate plan` chooses, with `keep` from `keeps`.

        Returns:
            Nothing where no plans are made of this method.
        """
        return ()

    def not_captured(self) -> str | None:
        """Why a CUDA graph cannot hold its step; None: it can."""
        return None

    def captured_at(self, longest: int) -> bool:
        """Whether a step that is captured with shapes of `longest` tokens takes little longer than the tokens that are
        there would; where it does not, it had better run eagerly."""
        return False

    def not_shared(self) -> str | None:
        """Why layers that share keys and values cannot read one cache of it, and what to take; None: they can."""
        return None

    def not_paged(self) -> str | None:
        """Why a serving engine cannot hold its cache in pages, which sequences share and leave to others; None: it
        can."""
        return None if self.keeps_all_tokens else "it evicts tokens, which the pages of an engine cannot"

    def check_changed_keys(self, layer: int, bases: Mapping[str, Tensor]) -> None:  # noqa: B027 (most need nothing)
        """Check that the method can work in a layer whose keys are others than those that the artifact was fitted to.

        Args:
            bases: tensors of bases that were fitted to the layer's present keys, named as in the stage `pca`.

        Raises:
            KvcalError: the method needs what was fitted to the present keys, and `bases` does not have it.
        """


class SequenceIndex(ABC):
    """What is built over whole sequences, such as clusters, because it does not follow from tokens one by one. The host
    says when to build it, and steps read its tensors. Every store has one of its own.

    Throughout, `lengths` are the tokens of each sequence, and `buffers` has the token buffers "key" and "value".
    """

    def begin(self, sequences: int, device: torch.device) -> None:  # noqa: B027
        """Get ready for a batch of so many sequences on this device."""

    def prefilled(  # noqa: B027
        self, before: Sequence[int], after: Sequence[int], buffers: Mapping[str, TokenBuffer]
    ) -> None:
        """Prefill has taken the sequences from `before` to `after` tokens."""

    def due(self, lengths: Sequence[int]) -> bool:
        """Whether `build` has something to do before the next token of these sequences."""
        return False

    def build(  # noqa: B027
        self, lengths: Sequence[int], coming: Sequence[bool], buffers: Mapping[str, TokenBuffer]
    ) -> None:
        """Build whatever part of the sequence index is due before the next token.

        Args:
            coming: of each sequence, whether it gets a token now.
        """

    def crop(self, lengths: Sequence[int]) -> None:  # noqa: B027
        """Forget all tokens beyond these lengths."""

    @abstractmethod
    def reorder(self, order: Tensor) -> None:
        """Keep the sequences `order` [B'], in that order, repeats allowed."""

    @abstractmethod
    def to(self, device: torch.device | str) -> None: ...

    def reserve(self, tokens: int, lengths: Sequence[int]) -> None:  # noqa: B027
        """Make room for what is needed until sequences have `tokens` tokens."""

    @abstractmethod
    def tensors(self) -> Mapping[str, Tensor]:
        """All tensors held, [B, Hkv, …]. A captured step is void once `reserve` or `build` gives one a new address."""

    @abstractmethod
    def entries(self) -> int:
        """How many entries, such as clusters, all sequences have together, per KV head."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """The tensors that a saved cache needs for `restore`."""

    @abstractmethod
    def check(self, saved: Saved) -> None:
        """Raises KvcalError where these tensors cannot belong to the tokens of the same saved cache."""

    @abstractmethod
    def restore(self, state: Mapping[str, Tensor], buffers: Mapping[str, TokenBuffer]) -> None: ...


class Policy(ABC):
    """A method in one layer: fitted tensors and settings, no state. One object for all caches of a model."""

    accumulates = False
    """Whether a cache adds up the attention that each token receives (`RECEIVED`)."""
    observes = 0
    """How many of the last queries a cache keeps: where tokens are evicted those of a prompt, until its first decoded
    token."""

    offloaded: tuple[str, ...] = ()
    """Names of the token buffers that are kept on the host; `LayerCache.gather` reads them together."""
    cached = 0
    """Offloaded tokens per KV head that are cached on the device."""
    fitted_to: tuple[int | None, int | None, int | None] = (None, None, None)
    """KV heads, dimensions of keys and of values that the policy was fitted to; None: any."""
    largest: Mapping[str, int] = {}
    """By name of a token buffer, the largest value of an entry: a larger one, in a saved cache, would read out of
    bounds."""
    keeps_keys_values = True
    """Whether "key" and "value" are kept as they came, so that everything else can be made from them again."""
    grouped = False
    """Whether its store is a `GroupStore`: tokens are kept by `encode_after`."""
    recent_rows = 0
    """How many of the last tokens such a store holds as they came, too."""
    earlier: tuple[int, ...] = ()
    """Layers that this one's tokens are kept relative to and whose caches its steps read, too."""

    def on_heads(self, heads: slice) -> Policy:
        """The policy for some of the KV heads, where processes share them."""
        return self

    def sequence_index(self) -> SequenceIndex | None:
        """A new sequence index, for one cache; None: the method has none."""
        return None

    def encode(self, key: Tensor, value: Tensor) -> Mapping[str, Tensor]:
        """All that is kept of tokens, by name, "key" and "value" included: [B, Hkv, T, …] from [B, Hkv, T, D | Dv].

        What is kept of a token follows from that token alone, so whoever moves, shares or takes back tokens need not
        know what it is.
        """
        return {"key": key, "value": value}

    def encode_after(
        self, key: Tensor, value: Tensor, position: Tensor, earlier: Sequence[Mapping[str, Tensor]]
    ) -> Mapping[str, Tensor]:
        """As `encode`, for policies that are `grouped`, whose `encode` tells the shapes of no tokens alone.

        Args:
            position: [T] or [B, T] int64, of the tokens in their sequences.
            earlier: what each of the layers `earlier` keeps of the same tokens.
        """
        raise NotImplementedError

    def keys_values(self, cache: LayerCache) -> tuple[Tensor, Tensor]:
        """(keys [B, Hkv, longest, D], values) of every token held, decoded where they are kept in fewer bits."""
        return cache.tokens("key"), cache.tokens("value")

    def query(self, query: Tensor) -> Tensor:
        """[B, Hq, T, D] -> the same shape: queries whose dot products with the keys of `keys_values` are q·k."""
        return query

    def attend_all(self, query: Tensor, cache: LayerCache, spec: SoftmaxSpec, limits: Tensor | None) -> Tensor:
        """[B, Hq, T, Dv]: dense attention of the T tokens that came last, queries [B, Hq, T, D].

        Args:
            limits: [B, T] int64, how many tokens, from the first, each query sees; None: the sequences are these
                T tokens, and attention is plainly causal.
        """
        key, value = (tensor.to(query.dtype) for tensor in self.keys_values(cache))
        return causal_attention(self.query(query), key, value, spec, limits)

    def write(self, cache: LayerCache, new: Mapping[str, Tensor]) -> None:
        """Write all that is kept of each sequence's last token, [B, Hkv, 1, …] by name, to its place in the cache.

        Where the method is captured, nothing here may wait for the device.
        """
        if self.sums:
            cache.add_last(self.add_up(new))
        cache.write_last(new)
        if cache.summaries and cache.metadata.may_fill(self.summarise_every):
            cache.summarise_last(self.summarised, self.summarise, self.summarise_every)

    def append(self, cache: LayerCache, key: Tensor, value: Tensor) -> bool:
        """Do what `write` does with what `encode` makes of a token [B, Hkv, 1, D | Dv], in one kernel; False: none does
        it."""
        return False

    def summarise(self, page: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The summaries of n pages, [n, Hkv, …] by name, from the tokens in them, [n, PAGE, Hkv, …] by name.

        A summary follows from the page's token buffers in `summarised` alone. It is made again whenever
        `summarise_every` more tokens have come to the page. Of a page that is not full, steps read only the part that
        will not change any more: of Quest's boxes those of full `page`s.
        """
        return {}

    summarised: tuple[str, ...] = ("key", "value")
    """Names of the token buffers that `summarise` takes."""
    summarise_every = PAGE
    """Tokens; the number divides PAGE."""

    sums: tuple[str, ...] = ()
    """Names of the sums that `add_up` adds to."""

    def add_up(self, kept: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What each token adds to the sums that are kept of its sequence: [B, Hkv, T, …] float32 by name, from all that
        is kept of tokens, likewise by name."""
        return {}

    @abstractmethod
    def step(self, query: Tensor, cache: LayerCache, spec: SoftmaxSpec) -> Attended:
        """Attend from the last token of every sequence, which the cache holds already.

        Where the method is captured, nothing here may wait for the device, and all shapes follow from the host's
        numbers in `cache.metadata`: a CUDA graph captures just what runs eagerly.

        Args:
            query: [B, Hq, 1, D].
        """

    def token_bytes(self, widths: Widths) -> int:
        """Bytes that a step reads of one selected token, per KV head."""
        return widths["key"] + widths["value"]

    def tokens_read(self, selected: Selected | Marked) -> Tensor:
        """[] int64: how many tokens a step reads, over all sequences and heads; each costs `token_bytes`."""
        return selected.count()

    def selection_bytes(self, reading: Reading) -> int:
        """Bytes that a step reads beside selected tokens, of all sequences: to select them, and for what stands for the
        others. Waits for the device."""
        return 0

    def shared_bytes(self, widths: Widths) -> int:
        """Bytes that a step reads once for all sequences, maps and codebooks; of steps that select tokens."""
        return 0

    def dense_bytes(self, reading: Reading) -> int:
        """Bytes that a step reads when it reads every token held. Waits for the device."""
        return reading.tokens() * reading.heads * (reading.widths["key"] + reading.widths["value"])


@dataclass(frozen=True)
class Reading:
    """What a step has read, kept without a reference to the cache."""

    policy: Policy
    metadata: DecodeMetadata
    selected: Selected | Marked | None
    heads: int
    """Hkv"""
    widths: Widths
    entries: int
    """`SequenceIndex.entries`; 0 without a sequence index."""
    position: Tensor | None = None
    """[B, Hkv, slots] int32: the position of the token in each slot, -1 where there is none; None: slots are
    positions."""

    def tokens(self) -> int:
        """Tokens held, of all sequences. Waits for the device."""
        return int(self.metadata.seq_lens.sum())

    def bytes_read(self) -> int:
        """Bytes read of keys and values, and of what the policy keeps beside them. Waits for the device."""
        policy, widths = self.policy, self.widths
        if self.selected is None:
            return policy.dense_bytes(self)
        chosen = int(policy.tokens_read(self.selected)) * policy.token_bytes(widths)
        return chosen + policy.selection_bytes(self) + policy.shared_bytes(widths)

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
        return self.selected.mask(metadata.longest)
