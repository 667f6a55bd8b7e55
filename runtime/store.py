"""One layer's cache: the tokens of a batch by page, the policy that says what is kept of them and what a step reads,
and how many tokens each sequence has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..artifacts import KvcalError
from .attention import Logits, attention_mass
from .kv.buffers import Places, find_places, visible
from .kv.last_queries import LastQueries
from .kv.layer import LayerBuffers
from .kv.pages import RECEIVED, DecodeMetadata, LayerCache, contiguous_metadata
from .kv.saved import FLOATS, Saved, require
from .kv.sequences import Sequences
from .methods.base import Attended, Policy, Reading

EXACT = ("key", "value")
"""Names of what is kept of tokens as it came."""


class Store(Sequences):
    """Keys and values of B sequences of one layer, of unequal lengths; padding is never stored.

    Shapes throughout: query [B, Hq, T, D], key [B, Hkv, T, D], value [B, Hkv, T, Dv], output [B, Hq, T, Dv].
    """

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy
        self.buffers = self._buffers()
        self.tokens = self.buffers.tokens
        """What is kept of each token, [B, Hkv, tokens, …] by name."""
        self.index = policy.index()
        self.last: Reading | None = None
        """What the last step read."""
        self.observes = policy.observes
        self.observed: LastQueries | None = None
        """The last `observes` queries of the prompt."""
        self.accumulates = policy.accumulates
        """Whether `tokens` has what each token has received of all attention so far."""
        self.like: tuple[Tensor, Tensor] | None = None
        """Tensors of the heads, dimensions and dtype of the keys and values that came; None before the first."""
        self._metadata: DecodeMetadata | None = None
        """Of the sequences as they are; None: they have changed since."""

    def _buffers(self) -> LayerBuffers:
        return LayerBuffers(self.policy)

    @property
    def held(self) -> list[int]:
        """Tokens of each sequence that are held, the same number in every KV head."""
        return self.lengths

    # Tokens come

    def prefill(self, query: Tensor, key: Tensor, value: Tensor, logits: Logits, valid: Tensor | None = None) -> Tensor:
        """Take in T tokens and attend densely from each of them.

        Args:
            valid: [B, T] bool on the CPU, False at padding; None = no padding.
        """
        self._take(self.encoded(key, value), valid)
        if self.observes:
            position = self._positions(query.shape[2], valid, query.device)
            self._observe(LastQueries.of(query, position, logits, self.observes))
        if self.accumulates:
            limits = self._visible(query, valid)
            if limits is not None and valid is not None:  # what queries at padding attend to does not count
                limits = limits.masked_fill(~valid.to(limits.device), 0)
            self.cache().receive(attention_mass(query, self.tokens["key"].view, logits, limits))
        return self.attend_all(query, logits, valid)

    def take(
        self,
        key: Tensor,
        value: Tensor,
        valid: Tensor | None = None,
        received: Tensor | None = None,
        observed: LastQueries | None = None,
    ) -> None:
        """Take in T tokens whose attention is computed elsewhere.

        Args:
            valid: [B, T] bool on the CPU, False at padding; None = no padding.
            received: [B, Hkv, T] float32, what each has received of all attention so far. None: that is not known.
            observed: the last queries of them. None: they are not known.

        Raises:
            KvcalError: this store needs something of these, and it is not known.
        """
        self._check_known(key, valid, received, observed)
        new = self.encoded(key, value)
        if received is not None and self.accumulates:
            new[RECEIVED] = received.unsqueeze(-1)
        if observed is not None and self.observes:
            self._observe(observed.last(self.observes))
        self._take(new, valid)

    def _check_known(
        self, key: Tensor, valid: Tensor | None, received: Tensor | None, observed: LastQueries | None
    ) -> None:
        """Raises KvcalError: `take` lacks what this store needs."""
        if self.accumulates and received is None:
            raise KvcalError(
                "what tokens have received of attention, which h2o starts from, is not known of these: prefill with "
                "method full and record_mass=True, and crop nothing"
            )
        new = [key.shape[2]] * len(key) if valid is None else valid.sum(1).tolist()
        lengths = [before + count for before, count in zip(self.lengths or [0] * len(key), new, strict=True)]
        known = observed is not None and observed.count >= self.observes and observed.whole(lengths)
        if self.observes and not known:
            raise KvcalError(
                f"the last {self.observes} queries of a prompt, which snapkv starts from, are not known of these "
                f"tokens: prefill with method full and record_queries={self.observes}, and crop nothing"
            )

    def _observe(self, last: LastQueries) -> None:
        self.observed = last if self.observed is None else self.observed.then(last)

    def _take(self, new: Mapping[str, Tensor], valid: Tensor | None) -> None:
        key = new["key"]
        before = self.lengths or [0] * len(key)
        self._write(new, valid)
        if self.index is not None:
            self.index.begin(len(before), key.device)
            self.index.prefilled(before, self.lengths, self.tokens)
            self.buffers.moved()

    def append(self, key: Tensor, value: Tensor, valid: Tensor | None = None, revocable: bool = False) -> None:
        """Take in one decoded token per sequence.

        Args:
            valid: [B, 1] bool on the CPU, False where a sequence gets none; None = all get one.
            revocable: whether `crop` may take the token back (speculative decoding); where every token is kept it
                always may.
        """
        coming = [True] * len(key) if valid is None else valid[:, 0].tolist()
        if self.index is not None:
            self._before_token(coming, key.device)
        new = self.encoded(key, value)
        if not self.tokens or not all(coming):
            self._write(new, valid)
            return
        before = self.lengths
        self._advance(len(key), 1)
        if max(self.lengths) > self.buffers.capacity:
            self.buffers.reserve(max(self.lengths), new)
        self._metadata = None
        self.buffers.lengths_changed(self.lengths)
        for name in self.policy.offloaded:
            self.tokens[name].write(new.pop(name), find_places(before, 1, None, key.device))
        self.policy.write(self.cache(), new)

    def encoded(self, key: Tensor, value: Tensor) -> dict[str, Tensor]:
        """All that is kept of new tokens, by name."""
        self.like = self.like or (key[:0, :, :0], value[:0, :, :0])
        new = dict(self.policy.encode(key, value))
        if self.accumulates:
            new[RECEIVED] = torch.zeros(*key.shape[:3], 1, dtype=torch.float32, device=key.device)
        return new

    # Attention

    def attend(self, query: Tensor, logits: Logits, valid: Tensor | None = None) -> Tensor:
        """Attend from the token that was appended last, T = 1.

        Args:
            valid: [B, 1] bool on the CPU, as of `append`: the query of a sequence that got none is padding.
        """
        cache = self.cache()
        found = self.policy.step(query, cache, logits)
        self.last = self._reading(cache, found)
        if self.buffers.device_cache and found.selected is None:  # all of it comes from the host
            self.buffers.device_cache.misses += sum(self.lengths) * cache.heads
        if self.observes:
            self._observe_step(query, logits, valid)
        if found.received is not None and self.accumulates:
            received = found.received
            if valid is not None:
                received = received.masked_fill(~valid.to(received.device).unsqueeze(-1), 0)
            cache.receive(received)
        return found.output

    def _observe_step(self, query: Tensor, logits: Logits, valid: Tensor | None) -> None:
        """Whoever takes these tokens over takes them as a prompt."""
        position = self.cache().metadata.seq_lens.long().unsqueeze(1) - 1
        if valid is not None:
            position = position.masked_fill(~valid.to(query.device), -1)
        self._observe(LastQueries.of(query, position, logits, self.observes))

    def read_by(self, query: Tensor, logits: Logits) -> int:
        """Bytes that a step of this query would read; what is held stays as it is. Waits for the device."""
        cache = self.cache()
        return self._reading(cache, self.policy.step(query, cache, logits)).bytes_read()

    def attend_all(self, query: Tensor, logits: Logits, valid: Tensor | None = None) -> Tensor:
        """Attend densely from each of the T tokens that came last, also with queries of another layer.

        Args:
            valid: [B, T] bool on the CPU, False at padding; None = no padding.
        """
        return self.policy.attend_all(query, self.cache(), logits, self._visible(query, valid))

    def _reading(self, cache: LayerCache, found: Attended) -> Reading:
        entries = 0 if self.index is None else self.index.entries()
        return Reading(
            self.policy, cache.metadata, found.selected, cache.pages["key"].shape[2], self.buffers.widths, entries
        )

    def _positions(self, tokens: int, valid: Tensor | None, device: torch.device) -> Tensor:
        """[B, tokens] int64: the place in its sequence of each of the tokens that came last, -1 at padding."""
        number = visible(self.lengths, tokens, valid, device)
        if number is None:
            return torch.arange(tokens, device=device).expand(len(self.lengths), -1)
        return number - 1 if valid is None else (number - 1).masked_fill(~valid.to(device), -1)

    def _visible(self, query: Tensor, valid: Tensor | None) -> Tensor | None:
        """[B, T] int64: how many tokens of its sequence each of the T that came last may see; None: plainly causal."""
        return visible(self.held, query.shape[2], valid, query.device)

    # What was read, and what is held

    def bytes_read(self) -> int:
        """Bytes of cache, index and projections that the last `attend` read."""
        return 0 if self.last is None else self.last.bytes_read()

    def read_mask(self) -> Tensor:
        """[B, Hq or Hkv, L] bool: the tokens of each sequence that the last `attend` read keys and values of, L the
        longest sequence."""
        assert self.last is not None
        return self.last.mask()

    def resident_bytes(self) -> int:
        """Bytes held on the device, the slack of growing buffers included; what is offloaded is in `host_bytes`."""
        queries = {} if self.observed is None else self.observed.state()
        return self.buffers.device_bytes() + sum(of.nbytes for of in (*self._built().values(), *queries.values()))

    def host_bytes(self) -> int:
        return self.buffers.host_bytes()

    def _built(self) -> Mapping[str, Tensor]:
        """Tensors of the sequence index."""
        return {} if self.index is None else self.index.tensors()

    def shared_bytes(self) -> int:
        """Of `bytes_read`, what is read once for all sequences: maps of a basis."""
        return self.policy.shared_bytes(self.buffers.widths)

    def as_they_came(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, LastQueries | None]:
        """What `take` makes the same cache of, in a store that keeps keys and values as they came: keys
        [B, Hkv, seen, D], values, `valid`, and what each token has received of attention and the last queries, where
        these are known."""
        received = self.tokens[RECEIVED].view if self.accumulates else None
        kept = self.tokens["key"].view, self.tokens["value"].view, received
        if self.valid is not None:
            slot = (self.valid.cumsum(1) - 1).clamp_min(0).to(kept[0].device)
            kept = tuple(None if of is None else gather(of, slot.unsqueeze(1)) for of in kept)  # type: ignore[assignment]
        return kept[0], kept[1], self.valid, None if kept[2] is None else kept[2].squeeze(-1), self.observed

    # What a step sees

    def cache(self) -> LayerCache:
        """What a step sees of this store now."""
        if self._metadata is None:
            assert self.like is not None
            self._metadata = contiguous_metadata(tuple(self.lengths), self.buffers.capacity, self.like[0].device)
        return self.buffers.at(self._metadata, self.index, self._built)

    def cache_at(self, metadata: DecodeMetadata) -> LayerCache:
        """The same with other metadata of its buffers, which steps of fixed shapes have."""
        return self.buffers.at(metadata, self.index, self._built)

    # Steps of fixed shapes, see `fixed_step`

    def held_metadata(self, metadata: DecodeMetadata) -> DecodeMetadata:
        """Of what is held of sequences that `metadata` describes, with shapes and addresses that stay."""
        return metadata

    def due(self, tokens: int) -> bool:
        """Whether the host has something to see to before the next token, `tokens` after those that were counted."""
        return self.index is not None and self.index.due([length + tokens for length in self.lengths])

    def reserve(self, tokens: int) -> None:
        """See to what is due, and make room for sequences of so many tokens. Addresses may change."""
        if self.index is not None:
            self.index.build(self.lengths, [True] * len(self.lengths), self.tokens)
            self.index.reserve(tokens, self.lengths)
        self.buffers.reserve(tokens, {name: buffer.view for name, buffer in self.tokens.items()})
        self._metadata = None

    def count(self, tokens: int) -> None:
        """So many tokens of each sequence have come by such steps."""
        self._advance(len(self.lengths), tokens)
        self._lengths_changed()

    def changed_by_step(self) -> list[Tensor]:
        """Tensors that a step changes besides the new token's slot; a graph's warm-up run is undone in them."""
        received = [self.tokens[RECEIVED].view] if self.accumulates else []
        return [*self.buffers.sums.values(), *received]

    def addresses(self) -> tuple[tuple[int, int], ...]:
        """(address, capacity) of everything that a step reads or writes: a graph captured with others is void."""
        tensors = (*self.buffers.tensors(), *self._built().values())
        return tuple((tensor.data_ptr(), tensor.shape[2]) for tensor in tensors)

    # Tokens go

    def crop(self, tokens: int) -> None:
        """Forget the last `tokens` positions, as if they had never come."""
        self._retreat(tokens)
        if self.accumulates:  # what the cropped queries gave cannot be told from the sums
            self.accumulates = False
            self.buffers.drop(RECEIVED)
        self.observes, self.observed = 0, None  # those before the cropped ones are gone
        self._lengths_changed()
        self.buffers.add_up_again(self.cache().metadata.valid())
        if self.index is not None:
            self.index.crop(self.lengths)
            self.buffers.moved()

    def settle(self) -> None:
        """The tokens that came as `revocable` stay."""

    def make_room(self) -> None:
        """Forget what the next token will make this store forget, before anything is known of that token. Several
        that come at once then find what a single one would find."""

    def reorder(self, index: Tensor) -> None:
        """Keep the sequences `index` [B'] of the batch, in that order, repeats allowed (beams)."""
        if not self.lengths:
            return
        self._keep(index)
        self.buffers.keep(index)
        if self.observed is not None:
            self.observed = self.observed.keep(index)
        if self.index is not None:
            self.index.reorder(index)
        self._lengths_changed()

    def to(self, device: torch.device | str) -> None:
        self.buffers.to(device)
        if self.observed is not None:
            self.observed = self.observed.to(device)
        if self.index is not None:
            self.index.to(device)
        if self.like is not None:
            self.like = self.like[0].to(device), self.like[1].to(device)
        self._metadata = None

    # Saved caches

    def state(self) -> dict[str, Tensor]:
        """All that has to be written to go on later, `restore` takes it: without what follows from keys and values,
        where these are kept as they came."""
        state = {f"tokens.{name}": buffer.view for name, buffer in self.tokens.items() if self._is_saved(name)}
        state |= {} if self.index is None else self.index.state()
        if not self.policy.keeps_keys_values and self.like is not None:
            state |= {"like.key": self.like[0], "like.value": self.like[1]}
        return state | self._counts() | ({} if self.observed is None else self.observed.state())

    def _is_saved(self, name: str) -> bool:
        return name in (*EXACT, RECEIVED) or not self.policy.keeps_keys_values

    def check(self, saved: Saved) -> None:
        """Raises KvcalError: no store of this method and these settings has such a `state`."""
        if saved.rows:
            self._check(saved)
            saved.finish()
        else:
            saved.check_empty(self.state())

    def _check(self, saved: Saved) -> None:
        if self.policy.keeps_keys_values:
            saved.take_tokens(saved.longest)
            if self.index is not None:
                self.index.check(saved)
            if self.accumulates and saved.has(f"tokens.{RECEIVED}"):
                saved.take_received()
            if self.observes:
                LastQueries.check(saved, self.observes)
            return
        heads, *dims = self.policy.fitted_to
        like = [saved.take(f"like.{name}", FLOATS, 0, heads, 0, of) for name, of in zip(EXACT, dims, strict=True)]
        for name, none in self.policy.encode(*like).items():
            shape = saved.rows, none.shape[1], saved.longest, none.shape[3]
            found = saved.take(f"tokens.{name}", none.dtype, *shape)
            if name in self.policy.most:
                most = self.policy.most[name]
                require(f"tokens.{name}", found <= most, f"0 to {most}")

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state` that was checked."""
        self._count_again(state["lengths"], state["valid"])
        self.observed = LastQueries.restore(state)
        self.observes = self.policy.observes if self.observed is not None or not state["valid"].shape[1] else 0
        self.buffers.clear()
        if not self.seen:
            return
        kept = {name[7:]: of for name, of in state.items() if name.startswith("tokens.")}
        self.accumulates = self.policy.accumulates and RECEIVED in kept
        if self.policy.keeps_keys_values:
            kept |= self.policy.encode(kept["key"], kept["value"])
        self.like = state.get("like.key", kept["key"][:0, :, :0]), state.get("like.value", kept["value"][:0, :, :0])
        self._put(kept, Places(self.held, slice(0, max(self.held))), [0] * len(self.lengths))
        self.buffers.add_up_again(self.cache().metadata.valid())
        if self.index is not None:
            self.index.begin(len(self.lengths), kept["key"].device)
            self.index.restore(state, self.tokens)
            self.buffers.moved()
        if self.policy.offloaded:  # attention is computed where the state came from
            self.to(state["tokens.key"].device)

    # How tokens are written

    def _write(self, new: Mapping[str, Tensor], valid: Tensor | None) -> None:
        """Put new tokens after those that are held."""
        before = self.lengths or [0] * len(new["key"])
        self._put(new, self._places(new["key"], valid), before)

    def _places(self, key: Tensor, valid: Tensor | None) -> Places:
        """Count new tokens [B, Hkv, T, D]; where they go, after those that are held."""
        batch, _, tokens, _ = key.shape
        held = self.held or [0] * batch
        self._advance(batch, tokens, valid)
        return find_places(held, tokens, valid, key.device)

    def _before_token(self, coming: Sequence[bool], device: torch.device) -> None:
        """See to what is due in the sequence index."""
        assert self.index is not None
        lengths = self.lengths or [0] * len(coming)
        self.index.begin(len(lengths), device)
        if self.index.due(lengths):
            self.index.build(lengths, coming, self.tokens)
            self.buffers.moved()

    def _put(self, new: Mapping[str, Tensor], places: Places, before: Sequence[int]) -> None:
        """Write tokens where they belong, and see to the pages that they fill, of sequences of `before` tokens."""
        if max(self.held) > self.buffers.capacity or not self.tokens:
            self.buffers.reserve(max(self.held), new)
        self._lengths_changed()
        self.buffers.put(new, places)
        self.buffers.summarise(self.cache(), before, self.lengths)

    def _lengths_changed(self) -> None:
        self._metadata = None
        self.buffers.lengths_changed(self.held)


def gather(tensor: Tensor, slot: Tensor) -> Tensor:
    """[B, H, S, D], [B, 1 or H, n] -> [B, H, n, D]."""
    return tensor.gather(2, slot.unsqueeze(-1).expand(-1, tensor.shape[1], -1, tensor.shape[3]))
