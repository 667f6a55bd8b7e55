"""One layer of a compressed cache, as transformers sees it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer

from ...artifacts import KvcalError
from ..attention import SoftmaxSpec
from ..store import Store
from .eagerly import eagerly
from .masks import Padding
from .rotation import Rotation

ANNOUNCED = hasattr(DynamicCache, "activate_past_recording")
"""Whether transformers tells a cache of assisted decoding; 5.8 does not."""
Observer = Callable[[int, Store, Tensor, Tensor, Tensor, SoftmaxSpec, Tensor], None]


@dataclass
class Call:
    """What the layers of one cache share."""

    model: weakref.ref[Any]
    padding: Padding = field(default_factory=Padding)
    recording: bool = False
    """transformers announced that tokens may be taken back by `crop`."""
    speculates: bool = not ANNOUNCED
    """Whether a call that asks for several logits may verify guesses: a `crop` has shown that assisted decoding was not
    announced, as it never is in old transformers."""
    drafts: int | None = None
    """How many of this forward call's last tokens are guesses to be verified, each as a step of its own."""
    observer: Observer | None = None
    rotations: list[Rotation] = field(default_factory=list)
    """Of the model's rotary embeddings, those that depend on the number of tokens."""
    length: int = 0
    """Tokens of the longest sequence when keys were last rotated."""

    def expect(self, tokens: int, logits: int | None) -> None:
        """Prepare for a forward call of so many new tokens that asks for the last `logits` logits (None: for all)."""
        guesses = logits - 1 if logits else None
        # Users crop, too, but do not then ask for exactly as many logits as they give tokens.
        verifies = self.recording or (self.speculates and (not ANNOUNCED or logits == tokens))
        self.drafts = guesses if verifies else None


@dataclass(frozen=True)
class Taken:
    """How a layer took in the tokens of one forward call."""

    tokens: int
    prompt: int
    """Of them, those that were prefilled; the rest are steps."""
    valid: Tensor | None
    """[B, tokens] bool on the CPU, False at padding; None: no padding."""


class CompressedLayer(CacheLayerMixin):
    """One layer of a `CompressedCache`. `update` only hands keys and values on: `attend`, which knows the query and the
    mask, writes and reads the store."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, layer_idx: int, build: Callable[[], Store], call: Call):
        super().__init__()
        self.layer_idx, self._build, self._call = layer_idx, build, call
        self._store = build()
        self._earlier: Sequence[CompressedLayer] = ()
        self._new: tuple[Tensor, Tensor] | None = None
        self.reading: Callable[[], int] = nothing_read
        """Tells the bytes that this layer's last decoded step read."""
        self.taken: Taken | None = None
        """How the last call's tokens were taken in, for layers that read this one's store."""

    @property
    def store(self) -> Store:
        return self._store

    def follow(self, earlier: Sequence[CompressedLayer]) -> None:
        """Keep tokens relative to those of the group's earlier layers."""
        self._earlier = earlier
        self._store.earlier = lambda: [layer.store for layer in earlier]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self._begin(key_states)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self._new is not None:
            raise KvcalError(
                f"layer {self.layer_idx}: the attention of an earlier call did not reach kvcal: begin a new cache; if "
                "it happens again, this architecture is not supported"
            )
        if not self.is_initialized:
            self._begin(key_states)
        self._new = (key_states, value_states)
        key = key_states.view_as(key_states)
        key.kvcal_layer = self  # type: ignore[attr-defined]
        return key, value_states

    @eagerly
    def attend(self, query: Tensor, mask: Tensor | None, spec: SoftmaxSpec) -> Tensor:
        """[B, Hq, T, D] -> [B, Hq, T, Dv], the T new tokens taken in."""
        assert self._new is not None
        (key, value), self._new = self._new, None
        store, tokens = self.store, key.shape[2]
        valid = None if mask is None else self._call.padding.of(mask, store, query)
        drafts = min(self._call.drafts or 0, tokens)
        if revocable := self._call.recording or drafts > 0:
            store.settle()
        prompt = tokens - drafts
        if prompt == 1 and store.seen:
            prompt = 0  # a step
        self.taken = Taken(tokens, prompt, valid)
        if tokens == 1 and not prompt:  # without slices, of which there are five below
            store.append(key, value, valid, revocable)
            return self._step(store, query, key, value, spec, valid)
        parts = []
        if prompt:
            new = slice(None, prompt)
            parts.append(store.prefill(query[:, :, new], key[:, :, new], value[:, :, new], spec, part(valid, new)))
        for token in range(prompt, tokens):
            one = slice(token, token + 1)
            one_valid = None if valid is None else part(valid, one)
            store.append(key[:, :, one], value[:, :, one], one_valid, revocable)
            parts.append(self._step(store, query[:, :, one], key[:, :, one], value[:, :, one], spec, one_valid))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def _step(
        self, store: Store, query: Tensor, key: Tensor, value: Tensor, spec: SoftmaxSpec, valid: Tensor | None
    ) -> Tensor:
        """The attention of one decoded token, which the store has taken in already."""
        out = store.attend(query, spec, valid)
        assert store.last is not None
        self.reading = store.last.bytes_read
        if self._call.observer is not None:
            self._call.observer(self.layer_idx, store, query, key, value, spec, out)
        return out

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from the `state()` of a store of the same method."""
        self.store.restore(state)
        if self.store.seen and self.store.like is not None:
            self._begin(self.store.like[0])

    @torch.inference_mode(False)
    def adopt(self, full: CompressedLayer) -> None:
        """Start from the tokens of a layer of method `full`."""
        tokens = full.store.as_they_came()
        self.store.take(*tokens)
        self._begin(tokens[0])

    def _begin(self, key: Tensor) -> None:
        self.is_initialized = True
        self.dtype, self.device = key.dtype, key.device

    def get_seq_length(self) -> int:
        return self.store.seen

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        # Before transformers 5.8 the argument was a tensor of positions.
        length = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.store.seen + length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.14

    def reset(self) -> None:
        self._store, self._new, self.is_initialized = self._build(), None, False
        self.follow(self._earlier)
        self.reading, self.taken = nothing_read, None

    def crop(self, tokens_to_remove: int) -> None:
        """Negative: remove so many tokens; positive (transformers before 5.14): the length to cut back to."""
        self._call.speculates = True
        seen = self.store.seen
        tokens = -tokens_to_remove if tokens_to_remove <= 0 else max(0, seen - tokens_to_remove)
        if tokens:
            self.store.crop(tokens)

    @torch.inference_mode(False)
    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.store.reorder(beam_idx)

    @torch.inference_mode(False)
    def batch_select_indices(self, indices: Tensor) -> None:
        sequences = torch.arange(len(self.store.lengths))
        self.store.reorder(sequences[indices.cpu()])

    @torch.inference_mode(False)
    def batch_repeat_interleave(self, repeats: int) -> None:
        self.store.reorder(torch.arange(len(self.store.lengths)).repeat_interleave(repeats))

    def to(self, device: torch.device) -> None:
        """Attend on this device from now on."""
        self.store.to(device)
        self.device = device

    def offload(self) -> None:
        self.store.to("cpu")

    def prefetch(self) -> None:
        if self.is_initialized:
            self.store.to(self.device)


def nothing_read() -> int:
    return 0


def part(valid: Tensor | None, tokens: slice) -> Tensor | None:
    return None if valid is None else valid[:, tokens]


def full_attention_layers(model: Any) -> tuple[list[int], int]:
    """(those of a model's layers whose cache keeps every token, how many layers it has)."""
    stock = DynamicCache(config=model.config).layers
    return [layer_idx for layer_idx, layer in enumerate(stock) if type(layer) is DynamicLayer], len(stock)
