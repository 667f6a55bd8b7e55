"""What the tokens of a batch are: each of the first requests decodes one token, the others take in prompts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...kv.pages import PAGE, DecodeMetadata, OncePerStep


@dataclass(frozen=True, eq=False)
class Prompt:
    """Tokens of one request that attend densely: a prompt's, or some that are verified."""

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
    decoding: int
    """Requests that decode a token, the first of the batch."""
    tokens: int
    """Of all requests."""
    decode: DecodeMetadata | None
    """Of those that decode; None: none do."""
    prompts: Sequence[Prompt]
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
    slots: Tensor, longest: int | None = None, exact: bool = True,
) -> Batch:  # fmt: skip
    """
    Args:
        starts: [requests + 1], where each request's tokens begin in the batch; those of one token that are not
            `prefilling` decode, as far as they come first. Requests without tokens are padding.
        lengths: [requests], tokens of each request, these included.
        seq_lens: [requests] int32, the same on the device.
        block_table: [requests, P] whole numbers: pages of PAGE tokens; beyond a request's pages anything.
        slots: [tokens or more].
        longest: of a step that is captured and replayed: the most tokens that a request may grow to.
        exact: whether requests that decode have so many tokens, and not fewer.
    """
    counts = [end - start for start, end in itertools.pairwise(starts)]
    decoding = 0
    while decoding < len(counts) and counts[decoding] <= 1 and not prefilling[decoding]:
        decoding += 1
    decode = None
    if decoding:
        decode = metadata(lengths[:decoding], seq_lens[:decoding], block_table[:decoding], longest, exact)
    prompts = [
        _prompt(slice(starts[at], starts[at + 1]), lengths[at], seq_lens[at : at + 1], block_table[at : at + 1])
        for at in range(decoding, len(counts))
        if counts[at]
    ]
    return Batch(decoding, starts[-1], decode, prompts, slots[: starts[-1]].long())


def metadata(
    lengths: Sequence[int], seq_lens: Tensor, block_table: Tensor, longest: int | None = None, exact: bool = True
) -> DecodeMetadata:
    """Of a step of sequences in an engine's pages; arguments as of `batch_of`."""
    if longest is not None:
        pages = -(-longest // PAGE)
        return DecodeMetadata(block_table[:, :pages].long(), seq_lens, longest, 0, contiguous=False, replayed=True)
    most = max(*lengths, 1)
    table = block_table[:, : -(-most // PAGE)].long()
    if not exact:
        return DecodeMetadata(table, seq_lens, most, 0, contiguous=False)
    return DecodeMetadata(table, seq_lens, most, min(lengths), contiguous=False, lengths=tuple(lengths))


def _prompt(tokens: slice, after: int, seq_lens: Tensor, block_table: Tensor) -> Prompt:
    count = tokens.stop - tokens.start
    before = after - count
    limits = torch.arange(before + 1, after + 1, device=seq_lens.device).unsqueeze(0) if before else None
    return Prompt(tokens, before, metadata([after], seq_lens, block_table), limits)


Dense = Callable[[Tensor, Tensor, Tensor], None]
"""Attends from the queries of a batch's prompts [T, Hq, D], which see keys and values in the pages [N, Hkv, PAGE, 2 D],
and writes the output [T, Hq, D]."""
