"""Which tokens of a sequence a step reads: the best by their scores, and those that are always read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...kernels import attend as attending
from ...kernels import select as selecting
from ...kernels.backend import choose as backend
from ...kernels.scan import MOST_SAMPLED
from ...kernels.scan import Budget as ScanBudget
from ..attention import SoftmaxSpec, attention
from ..kv.pages import PAGE, DecodeMetadata, LayerCache
from .amounts import Amount, Budget, check_choice, check_count
from .base import Selected
from .budgets import budgets

SELECTS = ("head", "group", "max")
CHOICES = ("exact", "sampled")
SLACK = 1.5
"""In torch a sampled choice reads at most so many times its budget."""


@dataclass(frozen=True)
class Selection(Budget):
    """Parameters of methods that read some tokens of each sequence."""

    select: str = "group"
    """"group": a KV head's query heads read the same tokens, those of the largest mean of their softmaxes. "max": the
    same, by the largest logit. "head": each query head reads its own, as published."""

    def check(self) -> None:
        super().check()
        check_choice("select", self.select, SELECTS)


@dataclass(frozen=True)
class Sampling(Selection):
    """Parameters of methods that may also choose tokens by a threshold."""

    choice: str = "exact"
    """"exact": the best tokens. "sampled": those that reach a threshold, taken from the scores of a strided sample."""
    sample: int = 1024
    """Tokens of that sample, at least. Of shorter sequences it is every token, and the choice is exact."""

    def check(self) -> None:
        super().check()
        check_choice("choice", self.choice, CHOICES)
        check_count("sample", self.sample, 16)

    def is_scan(self, longest: int) -> bool:
        """Whether a step of sequences of up to `longest` tokens is one scan on a GPU, whose programs end where the
        tokens do."""
        return (2 * self.sample if self.choice == "sampled" else longest) <= MOST_SAMPLED


@dataclass(frozen=True, eq=False)
class Counts:
    """How many tokens of each sequence a step reads, the same in all layers of equal settings."""

    lengths: Tensor
    """[B] int64"""
    longest: int
    """No sequence has more tokens."""
    wanted: Tensor
    """[B] int64: tokens that are read."""
    most: int
    """`wanted` is nowhere larger."""
    even: bool
    """Whether `wanted` is `most` everywhere, and all sequences are equally long."""
    first: Tensor
    """[B] int64: the first tokens, so many, are read whatever their scores."""
    begin: Tensor
    """[B] int64: from here to the end tokens are read whatever their scores."""
    has_always: bool
    """Whether there are such tokens."""

    @classmethod
    def of(cls, budget: Budget, metadata: DecodeMetadata, sinks: int = 0, recent: Amount = 0) -> Counts | None:
        """The counts of a step; None: every token is read.

        Args:
            sinks: first tokens that are always read.
            recent: last tokens that are always read. A count is lowered until they and the sinks take half of the
                budget at most, but not below 1; a fraction is one of the budget, rounded down.
        """
        if budget.of(metadata.longest) == metadata.longest:
            return None
        lengths, even = metadata.seq_lens.long(), metadata.shortest == metadata.longest
        wanted = budgets(budget, metadata.seq_lens).long()
        first = lengths.clamp_max(sinks)
        last = (wanted * recent).long() if isinstance(recent, float) else (wanted // 2 - first).clamp(1, recent)
        begin = torch.maximum(first, lengths - last)
        most, has_always = budget.of(metadata.longest) if even else budget.most(metadata.longest), bool(sinks or recent)
        if has_always:
            wanted = wanted.maximum(lengths - (begin - first))
            most = max(most, min(metadata.longest, sinks + bool(recent)))
        return cls(lengths, metadata.longest, wanted, most, even, first, begin, has_always)

    @cached_property
    def candidates(self) -> Tensor:
        """[B] int64: how many tokens scores choose among."""
        return self.begin - self.first

    @cached_property
    def room(self) -> Tensor:
        """[B] int64: how many of them are read."""
        return self.wanted - (self.lengths - self.candidates)

    @cached_property
    def position(self) -> Tensor:
        """[S] int64: 0, 1, 2, …"""
        return torch.arange(self.longest, device=self.lengths.device)

    @cached_property
    def candidate(self) -> Tensor:
        """[B, 1, 1, S] bool"""
        position = self.position
        return ((position >= self.first.unsqueeze(1)) & (position < self.begin.unsqueeze(1)))[:, None, None]

    @cached_property
    def always(self) -> Tensor | None:
        """[B, 1, 1, S] bool: tokens that are read whatever their scores; None: there are none."""
        if not self.has_always:
            return None
        return (self.position < self.lengths.unsqueeze(1))[:, None, None] & ~self.candidate

    @cached_property
    def full(self) -> Tensor:
        """[B, 1, 1, S // PAGE] bool: which pages are full."""
        page = self.position[: self.longest // PAGE]
        return (page < (self.lengths // PAGE).unsqueeze(1))[:, None, None]

    def sampled(self, sample: int) -> tuple[Tensor, Tensor]:
        """(stride, rank) [B] int64 each: the threshold is the score of the rank-th best of every stride-th token."""
        stride = (self.lengths // sample).clamp_min(1)
        return stride, ((self.room + stride // 2) // stride).clamp_min(1).masked_fill(self.room <= 0, 0)

    def scan_budget(self, sample: int) -> ScanBudget:
        """The budget of a scan.

        Args:
            sample: tokens of the sample, at least; 0: every token.
        """
        stride, rank = self.sampled(sample) if sample else (torch.ones_like(self.room), self.room)
        rank = rank.masked_fill(self.room >= self.candidates, -1)
        sampled = min(self.longest, 2 * sample) if sample else self.longest
        return ScanBudget(self.lengths, self.first, self.begin, stride, rank, self.longest, sampled)


def shared(logits: Tensor, select: str, normaliser: Tensor | None = None) -> Tensor:
    """[B, Hkv, G, S] -> [B, Hkv, G or 1, S]: the scores by which tokens are chosen, see `Selection.select`.

    Args:
        normaliser: [B, Hkv, G, 1], the logarithm of the mass that softmaxes are over; None: that of these tokens.
    """
    if select == "group":
        normaliser = logits.logsumexp(-1, keepdim=True) if normaliser is None else normaliser
        return (logits - normaliser).logsumexp(2, keepdim=True)  # in logarithms, where nothing underflows
    return logits.amax(2, keepdim=True) if select == "max" else logits


def choose(logits: Tensor, counts: Counts, select: str, sample: int = 0) -> Selected:
    """The tokens that a step reads.

    Args:
        logits: [B, Hkv, G, S], -inf beyond the tokens of a sequence, and at other tokens that softmaxes leave out.
        sample: where S is larger, the tokens that reach a threshold are read, taken from a sample of at least so many
            tokens; 0: the best tokens are read.
    """
    if sample and logits.shape[-1] > sample:
        return above_sampled(logits.masked_fill(~counts.candidate, -torch.inf), counts, select, sample)
    scores = shared(logits, select)
    if counts.always is not None:
        # The masks also replace NaN, the softmax of a sequence without candidates.
        scores = scores.masked_fill(~counts.candidate, -torch.inf).masked_fill(counts.always, torch.inf)
    return highest(scores, counts.wanted, counts.most, counts.even)


def highest(scores: Tensor, wanted: Tensor, most: int, even: bool = False) -> Selected:
    """The `wanted` best tokens of each sequence.

    Args:
        scores: [B, Hkv, G or 1, S], -inf where there is nothing to choose.
        wanted: [B] int64, of which none is above `most`, the host's bound.
        even: `wanted` is `most` everywhere, and no sequence has fewer scores above -inf.
    """
    most = min(most, scores.shape[-1])
    if backend("auto", scores) == "triton":
        sizes = scores.shape[1:-1]
        lengths = torch.full_like(wanted, scores.shape[-1], dtype=torch.int32)
        index, count = selecting.select(
            scores.flatten(1, 2).contiguous(), wanted.to(torch.int32), lengths, capacity_out=most
        )
        valid = torch.arange(most, device=scores.device) < count.unsqueeze(-1)
        return Selected(index.long().unflatten(1, sizes), valid.unflatten(1, sizes))
    if even:
        index = scores.topk(most, sorted=False).indices
        return Selected(index, torch.ones_like(index, dtype=torch.bool), padded=False)
    best = scores.topk(most)
    rank = torch.arange(most, device=scores.device)
    valid = (rank < wanted.view(-1, 1, 1, 1)) & (best.values > -torch.inf)
    return Selected(best.indices.masked_fill(~valid, 0), valid)


def above_sampled(logits: Tensor, counts: Counts, select: str, sample: int) -> Selected:
    """About `counts.room` of the best candidates: those that reach a threshold, which is the score that the same share
    of a strided sample reaches. Softmaxes are over the sample, too.

    So no sort of all scores is needed, and once the sample is known, each token is read or not by its own score. Where
    more than `SLACK · room` candidates reach the threshold, the first of them are read.

    Args:
        logits: [B, Hkv, G, S], -inf at tokens that are no candidates.
        sample: the sample has at least so many tokens, and fewer than twice as many: every `length // sample`-th token
            of a sequence.
    """
    total, lengths, room = logits.shape[-1], counts.lengths, counts.room
    stride, rank = counts.sampled(sample)
    strided = torch.arange(min(total, 2 * sample), device=logits.device) * stride.unsqueeze(1)
    sampled = logits.gather(-1, strided.clamp_max(total - 1)[:, None, None].expand(*logits.shape[:3], -1))
    sampled = sampled.masked_fill((strided >= lengths.unsqueeze(1))[:, None, None], -torch.inf)
    normaliser = sampled.logsumexp(-1, keepdim=True)
    scores = shared(logits, select, normaliser)
    best = shared(sampled, select, normaliser).topk(min(counts.most, strided.shape[1])).values
    rank = rank.clamp(1, best.shape[-1]).view(-1, 1, 1, 1)
    threshold = best.gather(-1, (rank - 1).expand(*best.shape[:3], 1))
    threshold = threshold.masked_fill((room >= counts.candidates).view(-1, 1, 1, 1), -torch.inf)
    reached = (scores >= threshold) & (scores > -torch.inf)
    reached &= reached.cumsum(-1) <= (room * SLACK).long().view(-1, 1, 1, 1)
    if counts.always is not None:
        reached |= counts.always
    width = min(int(counts.most * SLACK), total)
    slot = (reached.cumsum(-1) - 1).where(reached, width)
    position = torch.arange(total, device=scores.device).expand_as(slot)
    index = position.new_zeros(*slot.shape[:3], width + 1).scatter_(-1, slot, position)[..., :width]
    return Selected(index, torch.arange(width, device=scores.device) < reached.sum(-1, keepdim=True))


def attend_selected(query: Tensor, cache: LayerCache, selected: Selected, spec: SoftmaxSpec) -> Tensor:
    """[B, Hq, 1, Dv]: exact attention to the selected tokens.

    Args:
        query: [B, Hq, 1, D].
        selected: its valid entries come first.
    """
    index, valid = selected.index, selected.valid
    if backend("auto", query) == "triton" and cache.offloaded is None:
        table = cache.metadata.table
        key, value = (cache.tokens(name) if table is None else cache.part(name) for name in ("key", "value"))
        sink_logits = None if spec.sink_logits is None else spec.sink_logits.float()
        grouped = query.squeeze(2).unflatten(1, (key.shape[1], -1))
        if index.shape[2] == 1:
            index, valid = index.squeeze(2), valid.squeeze(2)
        out = attending.attend(
            grouped, key, value, index.to(torch.int32), valid.sum(-1, dtype=torch.int32),
            scaling=spec.scaling, softcap=spec.softcap, sink_logits=sink_logits, table=table,
        )  # fmt: skip
        return out.flatten(1, 2).unsqueeze(2)
    sizes = index.shape[2:]
    gathered = cache.gather(("key", "value"), index.flatten(2), valid.flatten(2))
    key, value = (tensor.unflatten(2, sizes).flatten(1, 2) for tensor in gathered)
    visible = valid.flatten(1, 2).unsqueeze(2) if selected.padded else None
    return attention(query, key, value, spec, visible)
