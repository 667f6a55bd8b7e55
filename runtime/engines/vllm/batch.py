"""What the tokens of a batch are: some requests decode one token each, the others take in prompts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...kv.pages import PAGE, DecodeMetadata, OncePerStep


@dataclass(frozen=True, eq=False)
class Prompt:
    """Tokens of one request that attend densely: a prompt's, or guesses that are verified."""

    tokens: slice
    """Which of the batch."""
    before: int
    """Tokens that the request had."""
    metadata: DecodeMetadata
    """With these tokens, of this request alone."""
    limits: Tensor | None
    """[1, T] int64: how many tokens each of them sees; None: they are all that there are."""


@dataclass(frozen=True, eq=False)
class Batch(OncePerStep):
    decoding: Sequence[int]
    """Requests that decode a token."""
    decode: DecodeMetadata | None
    """Of these; None: there are none."""
    decoded: slice | Tensor
    """Their tokens among those of the batch."""
    prompts: Sequence[Prompt]
    prompted: slice | Tensor
    """Tokens of prompts among those of the batch."""
    slots: Tensor
    """[tokens] int64: where tokens lie, page · PAGE + place."""
    _reckoned: dict = field(default_factory=dict, init=False, repr=False)

    def filled(self, every: int) -> Tensor:
        """[n] int64: the pages that prompts have brought to another multiple of `every` tokens, or beyond."""
        return self.once(("filled", every), lambda: self._filled(every))

    def _filled(self, every: int) -> Tensor:
        due = []
        for prompt in self.prompts:
            table, after = prompt.metadata.block_table[0], prompt.metadata.longest
            due.append(table[prompt.before // PAGE : -(-(after // every * every) // PAGE)])
        return torch.cat(due).long() if due else self.slots[:0]


def batch_of(
    starts: Sequence[int], lengths: Sequence[int], prefilling: Sequence[bool], seq_lens: Tensor, block_table: Tensor,
    slots: Tensor, longest: int | None = None, lengths_known: bool = True,
) -> Batch:  # fmt: skip
    """
    Args:
        starts: [requests + 1], where each request's tokens begin in the batch. Those of one token decode, unless they
            are `prefilling`. Requests without tokens are padding.
        lengths: [requests], tokens of each request, these included.
        prefilling: [requests or fewer]; the others are not.
        seq_lens: [requests] int32, the same on the device.
        block_table: [requests, P] whole numbers: pages of PAGE tokens; beyond a request's pages anything. A step that
            is captured reads this very memory when it is replayed.
        slots: [tokens or more].
        longest: of a step that is captured and replayed, in which every request decodes: the most tokens that a
            request may grow to.
        lengths_known: whether requests that decode have so many tokens, and not fewer.
    """
    counts = [end - start for start, end in itertools.pairwise(starts)]
    if longest is not None:
        every = range(len(counts))
        replayed = metadata(lengths, seq_lens, block_table, longest)
        return Batch(every, replayed, slice(len(every)), (), slice(0, 0), slots[: starts[-1]].long())
    prompt = [count > 1 or (count and at < len(prefilling) and prefilling[at]) for at, count in enumerate(counts)]
    decoding = [at for at, count in enumerate(counts) if count == 1 and not prompt[at]]
    others = [at for at, is_prompt in enumerate(prompt) if is_prompt]
    decode = None
    if decoding:
        rows = pick(decoding, seq_lens.device)
        known = [lengths[at] for at in decoding]
        decode = metadata(known, seq_lens[rows], block_table[rows], None, lengths_known)
    prompts = [
        _prompt(slice(starts[at], starts[at + 1]), lengths[at], seq_lens[at : at + 1], block_table[at : at + 1])
        for at in others
    ]
    tokens = [token for at in others for token in range(starts[at], starts[at + 1])]
    decoded, prompted = pick([starts[at] for at in decoding], slots.device), pick(tokens, slots.device)
    return Batch(decoding, decode, decoded, prompts, prompted, slots[: starts[-1]].long())


def pick(indices: Sequence[int], device: torch.device) -> slice | Tensor:
    """What picks entries of a tensor: a slice where they follow one another, which is nearly always."""
    if not indices:
        return slice(0, 0)
    if indices[-1] - indices[0] + 1 == len(indices):
        return slice(indices[0], indices[-1] + 1)
    return torch.tensor(indices, device=device)


def metadata(
    lengths: Sequence[int], seq_lens: Tensor, block_table: Tensor, longest: int | None = None,
    lengths_known: bool = True,
) -> DecodeMetadata:  # fmt: skip
    """Of a step of sequences in an engine's pages; arguments as of `batch_of`."""
    most = max(*lengths, 1) if longest is None else longest
    table = block_table[:, : -(-most // PAGE)]
    if longest is not None:
        return DecodeMetadata(table, seq_lens, longest, 0, contiguous=False, replayed=True)
    if not lengths_known:
        return DecodeMetadata(table, seq_lens, most, 0, contiguous=False)
    return DecodeMetadata(table, seq_lens, most, min(lengths), contiguous=False, lengths=tuple(lengths))


def _prompt(tokens: slice, after: int, seq_lens: Tensor, block_table: Tensor) -> Prompt:
    before = after - (tokens.stop - tokens.start)
    limits = torch.arange(before + 1, after + 1, device=seq_lens.device).unsqueeze(0) if before else None
    return Prompt(tokens, before, metadata([after], seq_lens, block_table), limits)
