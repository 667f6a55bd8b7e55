"""One layer's cache: its token buffers, how many tokens each sequence has, and the policy that says what is kept of a
token and which tokens a step reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..artifacts import KvcalError
from .attention import SoftmaxSpec, attention_mass
from .kv.buffers import Places, find_places, visible
from .kv.last_queries import LastQueries
from .kv.layer import LayerBuffers
from .kv.pages import RECEIVED, DecodeMetadata, LayerCache, contiguous_metadata
from .kv.saved import FLOATS, Saved, require
from .kv.sequences import Sequences
from .methods.base import Attended, Policy, Reading

EXACT = ("key", "value")
"""Token buffers that hold what the model gave."""


class Store(Sequences):
    """Keys and values of B sequences of one layer, of unequal lengths; padding is never stored.

    Shapes throughout: query [B, Hq, T, D], key [B, Hkv, T, D], value [B, Hkv, T, Dv], output [B, Hq, T, Dv].
    """

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy
        self.earlier: Callable[[], Sequence[Store]] = tuple
        """Gives the stores of the policy's `earlier` layers."""
        self.buffers = self._buffers()
        self.tokens = self.buffers.tokens
        """Token buffers by name, [B, Hkv, tokens, …] each."""
        self.sequence_index = policy.sequence_index()
        self.last: Reading | None = None
        """What the last `attend` read."""
        self.observes = policy.observes
        self.observed: LastQueries | None = None
        """The last `observes` queries; where tokens are evicted those of a prompt, until its first decoded token."""
        self.accumulates = policy.accumulates
        """Whether the buffer "received" adds up the attention that each token receives."""
        self.like: tuple[Tensor, Tensor] | None = None
        """Empty tensors with the heads, dimensions and dtype of the model's keys and values; None before the first."""
        self._metadata: DecodeMetadata | None = None
        """Metadata of the sequences as they are; None: they have changed since."""

    def _buffers(self) -> LayerBuffers:
        return LayerBuffers(self.policy)

    @property
    def held(self) -> list[int]:
        """How many tokens of each sequence are held, the same number in every KV head."""
        return self.lengths

    # Tokens come

    def prefill(
        self, query: Tensor, key: Tensor, value: Tensor, spec: SoftmaxSpec, valid: Tensor | None = None
    ) -> Tensor:
        """Take in T tokens and attend densely from each of them.

        Args:
            valid: [B, T] bool on the CPU, False at padding; None = no padding.
        """
        self._take(self.encoded(key, value), valid)
        if self.observes:
            position = self._positions(query.shape[2], valid, query.device)
            self._observe(LastQueries.of(query, position, spec, self.observes))
        if self.accumulates:
            limits = self._visible(query, valid)
            if limits is not None and valid is not None:  # what queries at padding attend to does not count
                limits = limits.masked_fill(~valid.to(limits.device), 0)
            self.cache().receive(attention_mass(query, self.tokens["key"].view, spec, limits))
        return self.attend_all(query, spec, valid)

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
            received: [B, Hkv, T] float32, the attention that each token has received so far. None: not known.
            observed: the last queries of these tokens. None: not known.

        Raises:
            KvcalError: the policy needs `received` or `observed`, which is not known.
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
        """Raises KvcalError: the policy needs `received` or `observed`, which is not known."""
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
        if self.sequence_index is not None:
            self.sequence_index.begin(len(before), key.device)
            self.sequence_index.prefilled(before, self.lengths, self.tokens)
            self.buffers.moved()

    def append(self, key: Tensor, value: Tensor, valid: Tensor | None = None, revocable: bool = False) -> None:
        """Take in one decoded token per sequence.

        Args:
            valid: [B, 1] bool on the CPU, False where a sequence gets none; None = all get one.
            revocable: whether a later `crop` may take the token back (a guess of speculative decoding). It matters only
                where tokens are evicted; others can always be cropped.
        """
        batch = key.shape[0]
        coming = [True] * batch if valid is None else valid[:, 0].tolist()
        if self.sequence_index is not None:
            self._before_token(coming, key.device)
        if not self.tokens or not all(coming):
            self._write(self.encoded(key, value), valid)
            return
        before = self.lengths
        self._advance(batch, 1)
        try:
            if max(self.lengths) > self.buffers.capacity:
                self.buffers.reserve(max(self.lengths), {name: buffer.view for name, buffer in self.tokens.items()})
            self._metadata = None
            self.buffers.lengths_changed(self.lengths)
            if self.policy.offloaded:
                new = self.encoded(key, value)
                for name in self.policy.offloaded:
                    self.tokens[name].write(new.pop(name), find_places(before, 1, None, key.device))
                self.policy.write(self.cache(), new)
            else:
                self.write_last(self.cache(), key, value)
        except BaseException:  # also Ctrl-C, while a kernel is compiled: the token has not come
            self._retreat(1)
            self._lengths_changed()
            raise

    def write_last(self, cache: LayerCache, key: Tensor, value: Tensor) -> None:
        """Write the last token of each sequence, [B, Hkv, 1, D | Dv], which the cache counts already."""
        if not self.policy.append(cache, key, value):
            self.policy.write(cache, self.encoded(key, value))

    def encoded(self, key: Tensor, value: Tensor) -> dict[str, Tensor]:
        """What the token buffers hold of new tokens, by name."""
        self.like = self.like or (key[:0, :, :0], value[:0, :, :0])
        new = dict(self.policy.encode(key, value))
        if self.accumulates:
            new[RECEIVED] = torch.zeros(*key.shape[:3], 1, dtype=torch.float32, device=key.device)
        return new

    # Attention

    def attend(self, query: Tensor, spec: SoftmaxSpec, valid: Tensor | None = None) -> Tensor:
        """Attend from the token that was appended last, T = 1.

        Args:
            valid: [B, 1] bool on the CPU, as of `append`: the query of a sequence that got none is padding.
        """
        cache = self.cache()
        found = self.policy.step(query, cache, spec)
        self.last = self._reading(cache, found)
        if self.buffers.device_cache and found.selected is None:  # all of it comes from the host
            self.buffers.device_cache.misses += sum(self.lengths) * cache.heads
        if self.observes:
            self._observe_step(query, spec, valid)
        if found.received is not None and self.accumulates:
            received = found.received
            if valid is not None:
                received = received.masked_fill(~valid.to(received.device).unsqueeze(-1), 0)
            cache.receive(received)
        return found.output

    def _observe_step(self, query: Tensor, spec: SoftmaxSpec, valid: Tensor | None) -> None:
        """Keep the query of a decoded token, too. A store that goes on from `as_they_came` treats all tokens as a
        prompt."""
        position = self.cache().metadata.seq_lens.long().unsqueeze(1) - 1
        if valid is not None:
            position = position.masked_fill(~valid.to(query.device), -1)
        self._observe(LastQueries.of(query, position, spec, self.observes))

    def read_by(self, query: Tensor, spec: SoftmaxSpec) -> int:
        """Bytes that a step of this query would read. Changes nothing; waits for the device."""
        cache = self.cache()
        return self._reading(cache, self.policy.step(query, cache, spec)).bytes_read()

    def attend_all(self, query: Tensor, spec: SoftmaxSpec, valid: Tensor | None = None) -> Tensor:
        """Attend densely from each of the last T tokens. The queries may be those of a layer that reads this store.

        Args:
            valid: [B, T] bool on the CPU, False at padding; None = no padding.
        """
        return self.policy.attend_all(query, self.cache(), spec, self._visible(query, valid))

    def _reading(self, cache: LayerCache, found: Attended) -> Reading:
        entries = 0 if self.sequence_index is None else self.sequence_index.entries()
        return Reading(
            self.policy, cache.metadata, found.selected, cache.pages["key"].shape[2], self.buffers.widths, entries
        )

    def _positions(self, tokens: int, valid: Tensor | None, device: torch.device) -> Tensor:
        """[B, tokens] int64: the positions of the last `tokens` tokens in their sequences, -1 at padding."""
        number = visible(self.lengths, tokens, valid, device)
        if number is None:
            return torch.arange(tokens, device=device).expand(len(self.lengths), -1)
        return number - 1 if valid is None else (number - 1).masked_fill(~valid.to(device), -1)

    def _visible(self, query: Tensor, valid: Tensor | None) -> Tensor | None:
        """[B, T] int64: how many tokens of its sequence each of the last T may see; None: plainly causal."""
        return visible(self.held, query.shape[2], valid, query.device)

    # What was read, and what is held

    def bytes_read(self) -> int:
        """Bytes that the last `attend` read: of selected tokens, of what is kept beside them, and of maps."""
        return 0 if self.last is None else self.last.bytes_read()

    def read_mask(self) -> Tensor:
        """[B, Hq or Hkv, longest] bool: the tokens whose keys and values the last `attend` read."""
        assert self.last is not None
        return self.last.mask()

    def resident_bytes(self) -> int:
        """Bytes held on the device, the slack of growing buffers included; `host_bytes` counts what is offloaded."""
        queries = {} if self.observed is None else self.observed.state()
        return self.buffers.device_bytes() + sum(
            tensor.nbytes for tensor in (*self._built().values(), *queries.values())
        )

    def host_bytes(self) -> int:
        return self.buffers.host_bytes()

    def _built(self) -> Mapping[str, Tensor]:
        """Tensors of the sequence index."""
        return {} if self.sequence_index is None else self.sequence_index.tensors()

    def shared_bytes(self) -> int:
        """The part of `bytes_read` that is read once for all sequences: maps of a basis, codebooks."""
        return self.policy.shared_bytes(self.buffers.widths)

    def as_they_came(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, LastQueries | None]:
        """The arguments of `take` with which another store takes over this one's tokens. Only for policies with
        `keeps_keys_values`.

        Returns:
            Keys [B, Hkv, seen, D], values, `valid`, the attention that each token has received and the last queries;
            the last two are None where they are not known.
        """
        received = self.tokens[RECEIVED].view if self.accumulates else None
        kept = self.tokens["key"].view, self.tokens["value"].view, received
        if self.valid is not None:
            slot = (self.valid.cumsum(1) - 1).clamp_min(0).to(kept[0].device)
            kept = tuple(None if part is None else gather(part, slot.unsqueeze(1)) for part in kept)  # type: ignore[assignment]
        return kept[0], kept[1], self.valid, None if kept[2] is None else kept[2].squeeze(-1), self.observed

    # What a step sees

    def cache(self) -> LayerCache:
        """The buffers and metadata that a step reads."""
        if self._metadata is None:
            assert self.like is not None
            self._metadata = contiguous_metadata(tuple(self.lengths), self.buffers.capacity, self.like[0].device)
        return self.buffers.at(self._metadata, self.sequence_index, self._built)

    def cache_at(self, metadata: DecodeMetadata) -> LayerCache:
        """The same buffers with the metadata of a step at fixed shapes."""
        return self.buffers.at(metadata, self.sequence_index, self._built)

    # Steps of fixed shapes, see `fixed_step`

    def held_metadata(self, metadata: DecodeMetadata) -> DecodeMetadata:
        """Metadata of the tokens that are held, from `metadata` of all tokens. Shapes and addresses do not change from
        step to step."""
        return metadata

    def due(self, tokens: int) -> bool:
        """Whether the host has work before the next token: clusters to build, tokens to evict.

        Args:
            tokens: how many have come by fixed steps since the last `count`.
        """
        return self.sequence_index is not None and self.sequence_index.due([length + tokens for length in self.lengths])

    def reserve(self, tokens: int) -> None:
        """Do what is `due`, and make room for sequences of so many tokens. Addresses may change."""
        if self.sequence_index is not None:
            self.sequence_index.build(self.lengths, [True] * len(self.lengths), self.tokens)
            self.sequence_index.reserve(tokens, self.lengths)
        self.buffers.reserve(tokens, {name: buffer.view for name, buffer in self.tokens.items()})
        self._metadata = None

    def count(self, tokens: int) -> None:
        """Count tokens that came by fixed steps, so many of each sequence."""
        self._advance(len(self.lengths), tokens)
        self._lengths_changed()

    def changed_by_step(self) -> list[Tensor]:
        """Tensors that a step changes besides the new token's slot: they are restored after the warm-up of a graph."""
        received = [self.tokens[RECEIVED].view] if self.accumulates else []
        return [*self.buffers.sums.values(), *received]

    def addresses(self) -> tuple[tuple[int, int], ...]:
        """(address, capacity) of all that a step reads or writes: once one changes, a captured graph is void."""
        tensors = (*self.buffers.tensors(), *self._built().values())
        return tuple((tensor.data_ptr(), tensor.shape[2]) for tensor in tensors)

    # Tokens go

    def crop(self, tokens: int) -> None:
        """Forget the last `tokens` positions, as if they had never come."""
        self._retreat(tokens)
        if self.accumulates:  # the attention that came from cropped queries cannot be subtracted
            self.accumulates = False
            self.buffers.drop(RECEIVED)
        self.observes, self.observed = 0, None  # older queries, which would take their place, are gone
        self._lengths_changed()
        self.buffers.add_up_again(self.cache().metadata.valid())
        if self.sequence_index is not None:
            self.sequence_index.crop(self.lengths)
            self.buffers.moved()

    def settle(self) -> None:
        """Make the `revocable` tokens permanent."""

    def make_room(self) -> None:
        """Evict now what the next token would evict. A call of several tokens (guesses that are verified) then attends
        to the same tokens as a decoded step."""

    def reorder(self, order: Tensor) -> None:
        """Keep the sequences `order` [B'] of the batch, in that order, repeats allowed (beams)."""
        if not self.lengths:
            return
        self._keep(order)
        self.buffers.keep(order)
        if self.observed is not None:
            self.observed = self.observed.keep(order)
        if self.sequence_index is not None:
            self.sequence_index.reorder(order)
        self._lengths_changed()

    def to(self, device: torch.device | str) -> None:
        self.buffers.to(device)
        if self.observed is not None:
            self.observed = self.observed.to(device)
        if self.sequence_index is not None:
            self.sequence_index.to(device)
        if self.like is not None:
            self.like = self.like[0].to(device), self.like[1].to(device)
        self._metadata = None

    # Saved caches

    def state(self) -> dict[str, Tensor]:
        """Tensors of a saved cache, for `restore`. With `keeps_keys_values` other buffers are left out: `encode` makes
        them again."""
        state = {f"tokens.{name}": buffer.view for name, buffer in self.tokens.items() if self._is_saved(name)}
        state |= {} if self.sequence_index is None else self.sequence_index.state()
        if not self.policy.keeps_keys_values and self.like is not None:
            state |= {"like.key": self.like[0], "like.value": self.like[1]}
        return state | self._counts() | ({} if self.observed is None else self.observed.state())

    def _is_saved(self, name: str) -> bool:
        return name in (*EXACT, RECEIVED) or not self.policy.keeps_keys_values

    def check(self, saved: Saved) -> None:
        """Raises KvcalError: a store of this method and these settings cannot have this `state`."""
        if saved.batch:
            self._check(saved)
            saved.finish()
        else:
            saved.check_empty(self.state())

    def _check(self, saved: Saved) -> None:
        if self.policy.keeps_keys_values:
            saved.take_tokens(saved.longest)
            if self.sequence_index is not None:
                self.sequence_index.check(saved)
            if self.accumulates and saved.has(f"tokens.{RECEIVED}"):
                saved.take_received()
            if self.observes:
                LastQueries.check(saved, self.observes)
            return
        heads, *dims = self.policy.fitted_to
        like = [saved.take(f"like.{name}", FLOATS, 0, heads, 0, width) for name, width in zip(EXACT, dims, strict=True)]
        for name, empty in self.policy.encode(*like).items():
            shape = saved.batch, empty.shape[1], saved.longest, empty.shape[3]
            found = saved.take(f"tokens.{name}", empty.dtype, *shape)
            if name in self.policy.largest:
                largest = self.policy.largest[name]
                require(f"tokens.{name}", found <= largest, f"0 to {largest}")

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state` that was checked."""
        self._count_again(state["lengths"], state["valid"])
        self.observed = LastQueries.restore(state)
        self.observes = self.policy.observes if self.observed is not None or not state["valid"].shape[1] else 0
        self.buffers.clear()
        if not self.seen:
            return
        kept = {name[7:]: tensor for name, tensor in state.items() if name.startswith("tokens.")}
        self.accumulates = self.policy.accumulates and RECEIVED in kept
        if self.policy.keeps_keys_values:
            kept |= self.policy.encode(kept["key"], kept["value"])
        self.like = state.get("like.key", kept["key"][:0, :, :0]), state.get("like.value", kept["value"][:0, :, :0])
        self._put(kept, Places(self.held, slice(0, max(self.held))), [0] * len(self.lengths))
        self.buffers.add_up_again(self.cache().metadata.valid())
        if self.sequence_index is not None:
            self.sequence_index.begin(len(self.lengths), kept["key"].device)
            self.sequence_index.restore(state, self.tokens)
            self.buffers.moved()
        if self.policy.offloaded:  # attention is computed where the state came from
            self.to(state["tokens.key"].device)

    # How tokens are written

    def _write(self, new: Mapping[str, Tensor], valid: Tensor | None) -> None:
        """Write new tokens after those that are held."""
        before = self.lengths or [0] * len(new["key"])
        self._put(new, self._places(new["key"], valid), before)

    def _places(self, key: Tensor, valid: Tensor | None) -> Places:
        """Count new tokens [B, Hkv, T, D], and find where they go: after those that are held."""
        batch, _, tokens, _ = key.shape
        held = self.held or [0] * batch
        self._advance(batch, tokens, valid)
        return find_places(held, tokens, valid, key.device)

    def _before_token(self, coming: Sequence[bool], device: torch.device) -> None:
        """Build what is due of the sequence index."""
        assert self.sequence_index is not None
        lengths = self.lengths or [0] * len(coming)
        self.sequence_index.begin(len(lengths), device)
        if self.sequence_index.due(lengths):
            self.sequence_index.build(lengths, coming, self.tokens)
            self.buffers.moved()

    def _put(self, new: Mapping[str, Tensor], places: Places, before: Sequence[int]) -> None:
        """Write tokens to their places, and summarise the pages that they fill.

        Args:
            before: tokens that each sequence had.
        """
        if max(self.held) > self.buffers.capacity or not self.tokens:
            self.buffers.reserve(max(self.held), new)
        self._lengths_changed()
        self.buffers.put(new, places)
        self.buffers.summarise(self.cache(), before, self.lengths)

    def _lengths_changed(self) -> None:
        self._metadata = None
        self.buffers.lengths_changed(self.held)


def gather(tensor: Tensor, slot: Tensor) -> Tensor:
    """[B, H, S, D], slots [B, 1 or H, n] -> [B, H, n, D]."""
    return tensor.gather(2, slot.unsqueeze(-1).expand(-1, tensor.shape[1], -1, tensor.shape[3]))
