"""The last queries of each sequence's prompt, for policies that ask what they attend to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention import SoftmaxSpec, probabilities
from .saved import FLOATS, Saved, require


@dataclass(frozen=True)
class LastQueries:
    """W queries per sequence; of a shorter prompt there are fewer, and its first entries are empty."""

    query: Tensor
    """[B, Hq, W, D]"""
    position: Tensor
    """[B, W] int64, ascending: the place in its sequence of each query's token; -1: the entry is empty."""
    spec: SoftmaxSpec
    """How their dot products with keys become logits."""

    @classmethod
    def of(cls, query: Tensor, position: Tensor, spec: SoftmaxSpec, count: int) -> LastQueries:
        """The last `count` of queries [B, Hq, T, D] at positions [B, T], -1 at padding."""
        missing = count - query.shape[2]
        if missing > 0:
            query = torch.cat((query.new_zeros(*query.shape[:2], missing, query.shape[3]), query), 2)
            position = torch.cat((position.new_full((len(position), missing), -1), position), 1)
        order = position.argsort(dim=1, stable=True)[:, -count:]
        index = order[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
        position = position.gather(1, order)
        # Queries at padding may hold anything.
        return cls(query.gather(2, index).masked_fill((position < 0)[:, None, :, None], 0), position, spec)

    def whole(self, lengths: Sequence[int]) -> bool:
        """Whether they are the last min(W, length) queries of sequences of these lengths. Waits for the device."""
        wanted = torch.tensor(list(lengths), device=self.position.device).clamp_max(self.count)
        newest = torch.tensor(list(lengths), device=self.position.device) - 1
        return bool(((self.position >= 0).sum(1) == wanted).all() and (self.position.amax(1) == newest).all())

    @property
    def count(self) -> int:
        """W"""
        return self.position.shape[1]

    def last(self, count: int) -> LastQueries:
        """The last `count` of these queries."""
        return LastQueries(self.query[:, :, -count:], self.position[:, -count:], self.spec)

    def then(self, later: LastQueries) -> LastQueries:
        """The last W of these queries and later ones."""
        query, position = torch.cat((self.query, later.query), 2), torch.cat((self.position, later.position), 1)
        return LastQueries.of(query, position, self.spec, self.count)

    def received(self, key: Tensor, position: Tensor) -> Tensor:
        """[B, Hkv, S] float32: the attention that tokens receive from these queries, added over a KV head's query
        heads.

        Args:
            key: [B, Hkv, S, D].
            position: [B, Hkv, S], of each token in its sequence, -1 where there is none.
        """
        query_position = self.position[:, None, :, None]
        seen = (position.unsqueeze(2) <= query_position) & (position.unsqueeze(2) >= 0)
        return probabilities(self.query, key, self.spec, seen).sum((2, 3))

    def where(self, kept: Sequence[bool]) -> LastQueries:
        """The queries of the sequences that are `kept`, and empty entries for the others."""
        gone = ~torch.tensor(list(kept), device=self.position.device).unsqueeze(1)
        return LastQueries(self.query, self.position.masked_fill(gone, -1), self.spec)

    def keep(self, order: Tensor) -> LastQueries:
        """The queries of the sequences `order` [B'], in that order."""
        order = order.to(self.query.device)
        return LastQueries(self.query[order], self.position[order], self.spec)

    def to(self, device: torch.device | str) -> LastQueries:
        sink_logits = self.spec.sink_logits
        spec = dataclasses.replace(self.spec, sink_logits=None if sink_logits is None else sink_logits.to(device))
        return LastQueries(self.query.to(device), self.position.to(device), spec)

    def state(self) -> dict[str, Tensor]:
        spec = self.spec
        numbers = torch.tensor((spec.scaling, spec.softcap or 0.0), dtype=torch.float64)
        state = {"last.query": self.query, "last.position": self.position, "last.scaling_softcap": numbers}
        return state if spec.sink_logits is None else {**state, "last.sink_logits": spec.sink_logits}

    @staticmethod
    def restore(state: Mapping[str, Tensor]) -> LastQueries | None:
        if "last.query" not in state:
            return None
        scaling, softcap = state["last.scaling_softcap"].tolist()
        spec = SoftmaxSpec(scaling, softcap or None, state.get("last.sink_logits"))
        return LastQueries(state["last.query"], state["last.position"], spec)

    @staticmethod
    def check(saved: Saved, count: int) -> None:
        """Raises KvcalError where what was saved are not `count` queries per sequence, of its last tokens."""
        if not saved.has("last.query"):
            return
        query = saved.take("last.query", FLOATS, saved.batch, None, count, saved.key.shape[3])
        if not query.shape[1] or query.shape[1] % saved.key.shape[1]:
            require("last.query", torch.tensor(False), f"a multiple of {saved.key.shape[1]} heads")
        position = saved.take("last.position", torch.int64, saved.batch, count)
        lengths = torch.tensor(saved.lengths).unsqueeze(1)
        last = position == lengths - count + torch.arange(count)
        require("last.position", (position == -1) | (last & (position >= 0)), "the last ones of the row, or -1")
        require("last.position", (position[:, 1:] >= 0) | (position[:, :-1] < 0), "none after the first")
        numbers = saved.take("last.scaling_softcap", torch.float64, 2)
        require("last.scaling_softcap", (numbers >= 0) & (numbers[:1] > 0), "positive numbers, 0 for no softcap")
        if saved.has("last.sink_logits"):
            saved.take("last.sink_logits", FLOATS, query.shape[1])
