"""Stores that score all tokens cheaply, then read keys and values of the best only."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention import Logits, attention
from .amounts import Budget, check_choice
from .row_store import RowStore


@dataclass(frozen=True)
class Selection(Budget):
    """What is read per step."""

    select: str = "group"
    """"head": each query head reads its own tokens (as published). "group", "max": the heads of a KV head read the
    same, those of the largest mean of their softmaxes, or of the largest logit in any, which needs no second pass."""

    def check(self) -> None:
        super().check()
        check_choice("select", self.select, ("head", "group", "max"))


@dataclass(frozen=True)
class Chosen:
    """Which tokens are read, per query head or per KV head."""

    index: Tensor
    """[B, Hkv, G or 1, k] int64, row positions; those that do not count repeat some token."""
    counted: Tensor | None
    """[B, Hkv, G or 1, k] bool; None: all."""


class SelectingStore(RowStore):
    """Score, choose, combine."""

    def __init__(self, selection: Selection):
        super().__init__()
        self.selection = selection

    def attend(self, query: Tensor, logits: Logits) -> Tensor:
        budgets = [self.selection.of(length) for length in self.lengths]
        if budgets == self.lengths:
            return self.attend_densely(query, logits)
        self._read = 0
        grouped = query.unflatten(1, (self.rows["key"].view.shape[1], -1)).squeeze(3)
        own = self._score(grouped, logits)
        chosen = self._pick(self._shared(own), budgets)
        self._read_rows = (chosen.index.flatten(1, 2), None if chosen.counted is None else chosen.counted.flatten(1, 2))
        return self._combine(query, logits, own, chosen)

    def _shared(self, own: Tensor) -> Tensor:
        """[B, Hkv, G, candidates] -> [B, Hkv, G or 1, candidates]: by what a choice is made."""
        if self.selection.select == "group":
            # The group's mean softmax, in logarithms, where nothing underflows.
            return own.log_softmax(-1).logsumexp(2, keepdim=True)
        return own.amax(2, keepdim=True) if self.selection.select == "max" else own

    @abstractmethod
    def _score(self, query: Tensor, logits: Logits) -> Tensor:
        """[B, Hkv, G, D] -> [B, Hkv, G, candidates] float32, -inf for those that a row has not; adds to `_read`."""

    def _pick(self, scores: Tensor, budgets: list[int]) -> Chosen:
        """All that is read."""
        return self._choose(scores, budgets)

    def _choose(self, scores: Tensor, budgets: list[int]) -> Chosen:
        return best(scores, budgets)

    def _combine(self, query: Tensor, logits: Logits, own: Tensor, chosen: Chosen) -> Tensor:
        """Exact attention to the chosen tokens.

        Args: own: the scores of `_score`, by query head.
        """
        key, value = self._gather(("key", "value"), chosen)
        visible = None if chosen.counted is None else chosen.counted.flatten(1, 2).unsqueeze(2)
        return attention(self._encode_query(query), key, value, logits, visible)

    def _gather(self, names: Sequence[str], chosen: Chosen) -> list[Tensor]:
        """[B, Hkv·(G or 1), k, …] of the chosen tokens, for each name."""
        gathered = []
        for rows in (self.rows[name].view for name in names):
            batch = torch.arange(rows.shape[0], device=rows.device).view(-1, 1, 1, 1)
            heads = torch.arange(rows.shape[1], device=rows.device).view(1, -1, 1, 1)
            gathered.append(rows[batch, heads, chosen.index].flatten(1, 2))
        self._read += sum(tokens.nbytes for tokens in gathered)
        return gathered

    def _masked(self, scores: Tensor) -> Tensor:
        """-inf beyond each row's tokens; [B, Hkv, G, S]."""
        held = self._held()
        return scores if held is None else scores.masked_fill(~held, -torch.inf)


def best(scores: Tensor, budgets: list[int]) -> Chosen:
    """The `budgets[b]` highest of row b, per head."""
    most = max(budgets)
    if min(budgets) == most:
        return Chosen(scores.topk(most, sorted=False).indices, None)
    index = scores.topk(most).indices
    allowed = torch.tensor(budgets, device=scores.device).view(-1, 1, 1, 1)
    return Chosen(index, (torch.arange(most, device=scores.device) < allowed).expand_as(index))
