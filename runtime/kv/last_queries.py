"""The last queries of each sequence's prompt, for policies that ask what they attend to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention import Logits, probabilities
from .saved import FLOATS, Saved, require


@dataclass(frozen=True)
class LastQueries:
    """W of each sequence; a shorter prompt has fewer, and the first ones are none."""

    query: Tensor
    """[B, Hq, W, D]"""
    position: Tensor
    """[B, W] int64, of the token in its sequence that each is of, ascending; -1: there is none."""
    logits: Logits
    """How they meet keys."""

    @classmethod
    def of(cls, query: Tensor, position: Tensor, logits: Logits, count: int) -> LastQueries:
        """The last `count` of queries [B, Hq, T, D] at positions [B, T], -1 at padding."""
        missing = count - query.shape[2]
        if missing > 0:
            query = torch.cat((query.new_zeros(*query.shape[:2], missing, query.shape[3]), query), 2)
            position = torch.cat((position.new_full((len(position), missing), -1), position), 1)
        order = position.argsort(dim=1, stable=True)[:, -count:]
        index = order[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
        position = position.gather(1, order)
        # What stands at padding may be anything.
        return cls(query.gather(2, index).masked_fill((position < 0)[:, None, :, None], 0), position, logits)

    def whole(self, lengths: Sequence[int]) -> bool:
        """Whether they are all of the last ones that sequences of these lengths have. Waits for the device."""
        wanted = torch.tensor(list(lengths), device=self.position.device).clamp_max(self.count)
        newest = torch.tensor(list(lengths), device=self.position.device) - 1
        return bool(((self.position >= 0).sum(1) == wanted).all() and (self.position.amax(1) == newest).all())

    @property
    def count(self) -> int:
        """W"""
        return self.position.shape[1]

    def last(self, count: int) -> LastQueries:
        """Fewer of them."""
        return LastQueries(self.query[:, :, -count:], self.position[:, -count:], self.logits)

    def then(self, later: LastQueries) -> LastQueries:
        """The last ones of both."""
        query, position = torch.cat((self.query, later.query), 2), torch.cat((self.position, later.position), 1)
        return LastQueries.of(query, position, self.logits, self.count)

    def received(self, key: Tensor, position: Tensor) -> Tensor:
        """[B, Hkv, S] float32: what tokens receive of the attention of these queries, added over a KV head's query
        heads.

        Args:
            key: [B, Hkv, S, D].
            position: [B, Hkv, S], of each token in its sequence, -1 where there is none.
        """
        own = self.position[:, None, :, None]
        seen = (position.unsqueeze(2) <= own) & (position.unsqueeze(2) >= 0)
        return probabilities(self.query, key, self.logits, seen).sum((2, 3))

    def where(self, kept: Sequence[bool]) -> LastQueries:
        """Of the sequences that are `kept`; of the others none."""
        gone = ~torch.tensor(list(kept), device=self.position.device).unsqueeze(1)
        return LastQueries(self.query, self.position.masked_fill(gone, -1), self.logits)

    def keep(self, index: Tensor) -> LastQueries:
        """Of the sequences `index` [B'], in that order."""
        index = index.to(self.query.device)
        return LastQueries(self.query[index], self.position[index], self.logits)

    def to(self, device: torch.device | str) -> LastQueries:
        sinks = self.logits.sinks
        logits = dataclasses.replace(self.logits, sinks=None if sinks is None else sinks.to(device))
        return LastQueries(self.query.to(device), self.position.to(device), logits)

    def state(self) -> dict[str, Tensor]:
        logits = self.logits
        numbers = torch.tensor((logits.scaling, logits.softcap or 0.0), dtype=torch.float64)
        state = {"last.query": self.query, "last.position": self.position, "last.scaling_softcap": numbers}
        return state if logits.sinks is None else {**state, "last.sinks": logits.sinks}

    @staticmethod
    def restore(state: Mapping[str, Tensor]) -> LastQueries | None:
        if "last.query" not in state:
            return None
        scaling, softcap = state["last.scaling_softcap"].tolist()
        logits = Logits(scaling, softcap or None, state.get("last.sinks"))
        return LastQueries(state["last.query"], state["last.position"], logits)

    @staticmethod
    def check(saved: Saved, count: int) -> None:
        """Raises KvcalError: no such queries of so many, of these tokens."""
        if not saved.has("last.query"):
            return
        query = saved.take("last.query", FLOATS, saved.rows, None, count, saved.key.shape[3])
        if not query.shape[1] or query.shape[1] % saved.key.shape[1]:
            require("last.query", torch.tensor(False), f"a multiple of {saved.key.shape[1]} heads")
        position = saved.take("last.position", torch.int64, saved.rows, count)
        lengths = torch.tensor(saved.lengths).unsqueeze(1)
        last = position == lengths - count + torch.arange(count)
        require("last.position", (position == -1) | (last & (position >= 0)), "the last ones of the row, or -1")
        require("last.position", (position[:, 1:] >= 0) | (position[:, :-1] < 0), "none after the first")
        numbers = saved.take("last.scaling_softcap", torch.float64, 2)
        require("last.scaling_softcap", (numbers >= 0) & (numbers[:1] > 0), "positive numbers, 0 for no softcap")
        if saved.has("last.sinks"):
            saved.take("last.sinks", FLOATS, query.shape[1])
