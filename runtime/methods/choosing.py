"""Which tokens of a sequence a step reads: the best by their scores, and those that are always read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels import attend as attending
from ...kernels import select as selecting
from ...kernels.backend import choose as backend
from ..attention import Logits, attention
from ..kv.pages import PAGE, DecodeMetadata, LayerCache
from .amounts import Amount, Budget, check_choice, check_count
from .base import Selected
from .budgets import budgets

SELECTS = ("head", "group", "max")
CHOICES = ("exact", "sampled")
SLACK = 1.5
"""A sampled choice reads at most so many times its budget."""


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
    """The same, where the choice may go by a threshold."""

    choice: str = "exact"
    """"exact": the best tokens. "sampled": those that reach a threshold, taken from the scores of a strided sample."""
    sample: int = 1024
    """Tokens of that sample, at least; of shorter sequences it is all of them, and the choice exact."""

    def check(self) -> None:
        super().check()
        check_choice("choice", self.choice, CHOICES)
        check_count("sample", self.sample, 16)


@dataclass(frozen=True)
class Counts:
    """How much of each sequence a step reads, the same in all layers of equal settings."""

    lengths: Tensor
    """[B] int64"""
    wanted: Tensor
    """[B] int64: tokens that are read."""
    most: int
    """`wanted` is nowhere larger."""
    even: bool
    """Whether `wanted` is `most` everywhere, and all sequences are equally long."""
    candidate: Tensor
    """[B, 1, 1, S] bool: what the choice is among."""
    candidates: Tensor
    """[B] int64: how many these are."""
    room: Tensor
    """[B] int64: how many of them are read."""
    always: Tensor | None
    """[B, 1, 1, S] bool: first and last tokens, which are read whatever their scores; None: there are none."""
    full: Tensor
    """[B, 1, 1, S // PAGE] bool: which pages are full."""

    @classmethod
    def of(cls, budget: Budget, metadata: DecodeMetadata, sinks: int = 0, recent: Amount = 0) -> Counts | None:
        """None: every token is read.

        Args:
            sinks: first tokens that are always read.
            recent: last tokens that are, with the sinks half of the budget at most (but the last, where there are
                any); or the share of the budget that they are, rounded down.
        """
        if budget.of(metadata.longest) == metadata.longest:
            return None
        lengths, even = metadata.seq_lens.long(), metadata.shortest == metadata.longest
        wanted = budgets(budget, metadata.seq_lens).long()
        first = lengths.clamp_max(sinks)
        last = (wanted * recent).long() if isinstance(recent, float) else (wanted // 2 - first).clamp(1, recent)
        begin = torch.maximum(first, lengths - last)
        position = metadata.positions()
        candidate = ((position >= first.unsqueeze(1)) & (position < begin.unsqueeze(1)))[:, None, None]
        always = None
        most = budget.of(metadata.longest) if even else budget.most(metadata.longest)
        if sinks or recent:
            always = (position < lengths.unsqueeze(1))[:, None, None] & ~candidate
            wanted, most = (
                wanted.maximum(lengths - (begin - first)),
                max(most, min(metadata.longest, sinks + bool(recent))),
            )
        candidates = begin - first
        full = torch.arange(metadata.longest // PAGE, device=lengths.device) < (lengths // PAGE).unsqueeze(1)
        room = wanted - (lengths - candidates)
        return cls(lengths, wanted, most, even, candidate, candidates, room, always, full[:, None, None])


def shared(scores: Tensor, select: str) -> Tensor:
    """[B, Hkv, G, S] -> [B, Hkv, G or 1, S]: by what a choice is made, see `Selection.select`."""
    if select == "group":
        return scores.log_softmax(-1).logsumexp(2, keepdim=True)  # in logarithms, where nothing underflows
    return scores.amax(2, keepdim=True) if select == "max" else scores


def choose(scores: Tensor, counts: Counts, sample: int = 0) -> Selected:
    """The tokens that a step reads.

    Args:
        scores: [B, Hkv, G or 1, S], -inf beyond the tokens of a sequence; of tokens that are always read anything.
        sample: where there are more tokens, what reaches a threshold from so many of them is taken; 0: always the best.
    """
    if sample and scores.shape[-1] > sample:
        return above_sampled(scores.masked_fill(~counts.candidate, -torch.inf), counts, sample)
    if counts.always is not None:
        # A sequence without candidates has no softmax of them, but NaN.
        scores = scores.masked_fill(~counts.candidate, -torch.inf).masked_fill(counts.always, torch.inf)
    return highest(scores, counts.wanted, counts.most, counts.even)


def highest(scores: Tensor, wanted: Tensor, most: int, even: bool = False) -> Selected:
    """The `wanted` best tokens of each sequence.

    Args:
        scores: [B, Hkv, G or 1, S], -inf where there is nothing to choose.
        wanted: [B] int64, of which none is above `most`, the host's bound.
        even: `wanted` is `most` everywhere, and there is as much to choose.
    """
    most = min(most, scores.shape[-1])
    if backend("auto", scores) == "triton":
        apart = scores.shape[1:-1]
        lengths = torch.full_like(wanted, scores.shape[-1], dtype=torch.int32)
        index, count = selecting.select(
            scores.flatten(1, 2).contiguous(), wanted.to(torch.int32), lengths, capacity_out=most
        )
        valid = torch.arange(most, device=scores.device) < count.unsqueeze(-1)
        return Selected(index.long().unflatten(1, apart), valid.unflatten(1, apart))
    if even:
        index = scores.topk(most, sorted=False).indices
        return Selected(index, torch.ones_like(index, dtype=torch.bool), pads=False)
    found = scores.topk(most)
    rank = torch.arange(most, device=scores.device)
    valid = (rank < wanted.view(-1, 1, 1, 1)) & (found.values > -torch.inf)
    return Selected(found.indices.masked_fill(~valid, 0), valid)


def above_sampled(scores: Tensor, counts: Counts, sample: int) -> Selected:
    """About as many of the best candidates as there is room for: those that reach the score which leaves as large a
    share of a strided sample.

    No sort of all scores, and nothing but the sample has to be known before a token is read or not. Where more than
    `SLACK` times as many reach it, the first of them are read.

    Args:
        scores: [B, Hkv, G or 1, S], -inf of all that is no candidate.
        sample: tokens that are looked at first, at least; fewer than twice as many are. It is taken by the length of
            the sequence: every `length // sample`-th token.
    """
    total, lengths, room = scores.shape[-1], counts.lengths, counts.room
    stride = (lengths // sample).clamp_min(1)
    at = torch.arange(min(total, 2 * sample), device=scores.device) * stride.unsqueeze(1)
    shape = (*scores.shape[:3], -1)
    sampled = scores.gather(-1, at.clamp_max(total - 1)[:, None, None].expand(shape))
    sampled = sampled.masked_fill((at >= lengths.unsqueeze(1))[:, None, None], -torch.inf)
    best = sampled.topk(min(counts.most, at.shape[1])).values
    rank = ((room + stride // 2) // stride).clamp(1, best.shape[-1]).view(-1, 1, 1, 1)
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


def attend_selected(query: Tensor, cache: LayerCache, selected: Selected, logits: Logits) -> Tensor:
    """[B, Hq, 1, Dv]: exact attention to the selected tokens.

    Args:
        query: [B, Hq, 1, D].
        selected: of which valid entries come first.
    """
    index, valid = selected.index, selected.valid
    if backend("auto", query) == "triton" and cache.metadata.contiguous and cache.offloaded is None:
        key, value = cache.tokens("key"), cache.tokens("value")
        sinks = None if logits.sinks is None else logits.sinks.float()
        grouped = query.squeeze(2).unflatten(1, (key.shape[1], -1))
        if index.shape[2] == 1:
            index, valid = index.squeeze(2), valid.squeeze(2)
        out = attending.attend(
            grouped, key, value, index.to(torch.int32), valid.sum(-1, dtype=torch.int32),
            scaling=logits.scaling, softcap=logits.softcap, sinks=sinks,
        )  # fmt: skip
        return out.flatten(1, 2).unsqueeze(2)
    apart = index.shape[2:]
    rows = cache.gather(("key", "value"), index.flatten(2), valid.flatten(2))
    key, value = (of.unflatten(2, apart).flatten(1, 2) for of in rows)
    visible = valid.flatten(1, 2).unsqueeze(2) if selected.pads else None
    return attention(query, key, value, logits, visible)
