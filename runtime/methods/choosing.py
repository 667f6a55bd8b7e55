"""Which tokens of a sequence a step reads: the best by their scores, and those that are always read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kv.pages import PAGE, DecodeMetadata
from ..stores.amounts import Budget
from .base import Selected
from .budgets import budgets

SELECTS = ("group", "max", "head")
SLACK = 1.5
"""A sampled choice reads at most so many times its budget."""


@dataclass(frozen=True)
class Counts:
    """What is read of each sequence, the same in all layers."""

    lengths: Tensor
    """[B] int64"""
    candidate: Tensor
    """[B, 1, 1, S] bool: what the choice is among."""
    candidates: Tensor
    """[B] int64: how many these are."""
    room: Tensor
    """[B] int64: how many of them are read."""
    most: int
    """`room` is nowhere larger."""
    always: Tensor
    """[B, 1, 1, sinks + recent] int64: first and last tokens, which are read anyway."""
    counted: Tensor
    """The same shape, bool: False pads."""
    full: Tensor
    """[B, 1, 1, S // PAGE] bool: which pages are full."""

    @classmethod
    def of(cls, budget: Budget, sinks: int, recent: int, metadata: DecodeMetadata) -> Counts | None:
        """None: every token is read."""
        if budget.of(metadata.longest) == metadata.longest:
            return None
        device, lengths = metadata.seq_lens.device, metadata.seq_lens.long()
        wanted = budgets(budget, metadata.seq_lens).long()
        first = lengths.clamp_max(sinks)
        last = (wanted // 2 - first).clamp(1, recent)
        begin = torch.maximum(first, lengths - last)
        room = torch.where(wanted == lengths, begin - first, (wanted - first - (lengths - begin)).clamp_min(0))
        at_first, at_last = (torch.arange(count, device=device) for count in (sinks, recent))
        always = torch.cat((at_first.expand(len(lengths), -1), begin.unsqueeze(1) + at_last), 1)
        counted = torch.cat((at_first < first.unsqueeze(1), begin.unsqueeze(1) + at_last < lengths.unsqueeze(1)), 1)
        position = metadata.positions()
        candidate = (position >= first.unsqueeze(1)) & (position < begin.unsqueeze(1))
        pages = torch.arange(metadata.longest // PAGE, device=device)
        wide = [of[:, None, None] for of in (candidate, always, counted, pages < (lengths // PAGE).unsqueeze(1))]
        return cls(lengths, wide[0], begin - first, room, budget.most(metadata.longest), *wide[1:])

    def with_always(self, chosen: Selected) -> Selected:
        shape = (*chosen.index.shape[:3], -1)
        index = torch.cat((self.always.expand(shape), chosen.index), -1)
        valid = torch.cat((self.counted.expand(shape), chosen.valid), -1)
        return Selected(index.where(valid, 0), valid)


def shared(scores: Tensor, select: str) -> Tensor:
    """[B, Hkv, G, S] -> [B, Hkv, G or 1, S]: by what a choice is made.

    Args: select: "group": the mean of the group's softmaxes, in logarithms. "max": the largest score in any head.
        "head": each query head its own.
    """
    if select == "group":
        return scores.log_softmax(-1).logsumexp(2, keepdim=True)
    return scores.amax(2, keepdim=True) if select == "max" else scores


def highest(scores: Tensor, room: Tensor, most: int) -> Selected:
    """The `room` best tokens of each sequence.

    Args:
        scores: [B, Hkv, G or 1, S], -inf where there is nothing to choose.
        room: [B] int64, of which none is above `most`, the host's bound.
    """
    found = scores.topk(min(most, scores.shape[-1]))
    rank = torch.arange(found.indices.shape[-1], device=scores.device)
    return Selected(found.indices, (rank < room.view(-1, 1, 1, 1)) & (found.values > -torch.inf))


def above_sampled(
    scores: Tensor, lengths: Tensor, room: Tensor, candidates: Tensor, most: int, sample: int
) -> Selected:
    """About `room` of the best tokens: those that reach the score which leaves `room` of a strided sample's share.

    No sort of all scores, and nothing but the sample has to be known before a token is read or not. Of more than
    `SLACK` times `room` tokens the first are read.

    Args:
        lengths: [B] int64 of the sequences, by which the sample is taken: every `length // sample`-th token.
        candidates: [B] int64: how many tokens of each sequence can be chosen; where there is room for all, all are.
        most: `room` is nowhere larger.
        sample: tokens that are looked at first, at least; fewer than twice as many are.
    """
    total = scores.shape[-1]
    stride = (lengths // sample).clamp_min(1)
    at = torch.arange(min(total, 2 * sample), device=scores.device) * stride.unsqueeze(1)
    shape = (*scores.shape[:3], -1)
    sampled = scores.gather(-1, at.clamp_max(total - 1)[:, None, None].expand(shape))
    sampled = sampled.masked_fill((at >= lengths.unsqueeze(1))[:, None, None], -torch.inf)
    best = sampled.topk(min(most, at.shape[1])).values
    rank = ((room + stride // 2) // stride).clamp(1, best.shape[-1]).view(-1, 1, 1, 1)
    threshold = best.gather(-1, (rank - 1).expand(*best.shape[:3], 1))
    threshold = threshold.masked_fill((room >= candidates).view(-1, 1, 1, 1), -torch.inf)
    reached = (scores >= threshold) & (scores > -torch.inf) & (room > 0).view(-1, 1, 1, 1)
    width = min(int(most * SLACK), total)
    allowed = (room * SLACK).long().clamp(max=width).view(-1, 1, 1, 1)
    turn = reached.cumsum(-1) - 1
    slot = turn.where(reached & (turn < allowed), width)
    position = torch.arange(total, device=scores.device).expand_as(slot)
    index = position.new_zeros(*slot.shape[:3], width + 1).scatter_(-1, slot, position)[..., :width]
    taken = (slot < width).sum(-1, keepdim=True)
    return Selected(index, torch.arange(width, device=scores.device) < taken)
