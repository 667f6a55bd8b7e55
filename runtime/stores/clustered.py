"""Stores whose tokens are in clusters, and the tail: what is not read contributes through its cluster.

A selecting method treats what it does not read as absent. The tail puts a cluster of n tokens of which m were
read in its place as n - m tokens at the cluster's mean key, with its mean value:

    out = (Σ_read e^{q·k} v + Σ_c (n_c - m_c) e^{q·k̄_c} v̄_c) / (Σ_read e^{q·k} + Σ_c (n_c - m_c) e^{q·k̄_c})

The mean key keeps the tokens that were read. That makes it too large for what is left, and e^{q·k̄} is below the
mean of e^{q·k} (Jensen): the two errors partly cancel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention import Logits
from .amounts import check_count, check_flag
from .clusters import Clusters, slot_index
from .full import FullStore
from .rows import CHUNK, Places, Rows
from .selecting import Chosen, SelectingStore, Selection


@dataclass(frozen=True)
class Clustered(Selection):
    tail: bool = False
    """What is not read contributes through its cluster."""
    tokens_per_cluster: int = 16
    window: int = 64
    """Decoded tokens that are clustered together once there are so many; until then they are read exactly."""
    sinks: int = 4
    """First tokens, in no cluster and read exactly."""

    def check(self) -> None:
        super().check()
        check_flag("tail", self.tail)
        check_count("tokens_per_cluster", self.tokens_per_cluster, 1)
        check_count("window", self.window, 1)
        check_count("sinks", self.sinks)


class ClusteredStore(SelectingStore):
    """Selects among the clustered tokens, and reads those that are in no cluster besides."""

    selection: Clustered
    clusters: Clusters | None = None

    def __init__(self, selection: Clustered):
        super().__init__(selection)
        if selection.tail:
            self.clusters = self._new_clusters()

    def _new_clusters(self) -> Clusters:
        of = self.selection
        return Clusters(
            self.rows, self._buffer, tokens_per_cluster=of.tokens_per_cluster, window=of.window, sinks=of.sinks
        )

    def _buffer(self, name: str) -> Rows:
        """Clusters are fewer than tokens, and their buffers grow accordingly."""
        per_cluster = name in ("cluster.key", "cluster.value", "cluster.size")
        return Rows(chunk=-(-CHUNK // self.selection.tokens_per_cluster)) if per_cluster else super()._buffer(name)

    def prefill(self, query: Tensor, key: Tensor, value: Tensor, logits: Logits, valid: Tensor | None = None) -> Tensor:
        before = self.lengths or [0] * key.shape[0]
        out = super().prefill(query, key, value, logits, valid)
        if self.clusters:
            self.clusters.prefilled(before, self.lengths)
        return out

    def adopt(self, full: FullStore) -> None:
        super().adopt(full)
        if self.clusters:
            self.clusters.prefilled([0] * len(self.lengths), self.lengths)

    def append(self, key: Tensor, value: Tensor, valid: Tensor | None = None) -> None:
        self._device = key.device
        coming = None if valid is None else valid[:, 0].tolist()
        slots = self.clusters.due(self.lengths, coming) if self.clusters else None
        if slots is not None:
            self._close(slots)
        super().append(key, value, valid)

    def attend(self, query: Tensor, logits: Logits) -> Tensor:
        if self.clusters and not any(self.clusters.counts):
            return self.attend_densely(query, logits)
        return super().attend(query, logits)

    def _close(self, slots: list[range]) -> None:
        """Cluster these slots of each row."""
        assert self.clusters
        self._remember(slots, self.clusters.add(slots, self._device))

    def _remember(self, slots: list[range], labels: Tensor) -> None:
        """Write the cluster [B, Hkv, L] of each slot: the tail has to know it of the tokens that were read."""
        index, held = slot_index(slots, labels.device)
        row, _, token = held.nonzero(as_tuple=True)
        places = Places(self.lengths, (row, token, index[row, 0, token]), None)
        self.rows.setdefault("cluster.of", self._buffer("cluster.of")).write(
            labels.to(torch.int32).unsqueeze(-1), places
        )

    def _pick(self, scores: Tensor, budgets: list[int]) -> Chosen:
        if self.clusters is None:
            return self._choose(scores, budgets)
        open_slots = self.clusters.open_slots(self.lengths)
        most = max(map(len, open_slots))
        device = scores.device
        always = torch.tensor([[*row, *[-1] * (most - len(row))] for row in open_slots], device=device)
        # A row that is read whole is given room for all of its candidates, which may be more than its tokens.
        left = [
            length if budget == length else max(0, budget - len(row))
            for budget, length, row in zip(budgets, self.lengths, open_slots, strict=True)
        ]
        chosen = self._choose(self._hide_open(scores), left)
        counted = ~self._open(chosen.index)
        if chosen.counted is not None:
            counted &= chosen.counted
        always = always[:, None, None].expand(*chosen.index.shape[:3], -1)
        return Chosen(torch.cat((always.clamp_min(0), chosen.index), -1), torch.cat((always >= 0, counted), -1))

    def _open(self, slot: Tensor) -> Tensor:
        """Whether slots [B, …] are in no cluster."""
        assert self.clusters
        upto = torch.tensor(self.clusters.upto, device=slot.device).view(-1, *[1] * (slot.dim() - 1))
        return (slot < self.selection.sinks) | (slot >= upto)

    def _hide_open(self, scores: Tensor) -> Tensor:
        """Scores by token, without those that are read anyway."""
        slot = torch.arange(scores.shape[-1], device=scores.device).view(1, 1, 1, -1)
        return scores.masked_fill(self._open(slot.expand(scores.shape[0], -1, -1, -1)), -torch.inf)

    def _combine(self, query: Tensor, logits: Logits, scores: Tensor, chosen: Chosen) -> Tensor:
        if not self.selection.tail:
            return super()._combine(query, logits, scores, chosen)
        return self._weigh(query, logits, self._exact_logits(query, logits, chosen), chosen)

    def _exact_logits(self, query: Tensor, logits: Logits, chosen: Chosen) -> Tensor:
        """[B, Hkv, G, k] float32 logits of the chosen tokens."""
        key = self._gather("key", chosen).unflatten(1, chosen.index.shape[1:3])
        return logits.of(self._grouped(query).unsqueeze(3) @ key.mT).squeeze(3)

    def _weigh(self, query: Tensor, logits: Logits, exact: Tensor, chosen: Chosen) -> Tensor:
        """Softmax over the chosen tokens, and over the clusters' tails if there are any."""
        if chosen.counted is not None:
            exact = exact.masked_fill(~chosen.counted, -torch.inf)
        value = self._gather("value", chosen).unflatten(1, chosen.index.shape[1:3]).float()
        if self.selection.tail:
            exact = torch.cat((exact, self._tail_logits(query, logits, chosen)), -1)
        weights = logits.softmax(exact).unsqueeze(3)
        count = chosen.index.shape[-1]
        out = weights[..., :count] @ value
        if self.selection.tail:
            means = self.rows["cluster.value"].view
            self._read += means.nbytes
            out = out + weights[..., count:] @ means.float().unsqueeze(2)
        return out.flatten(1, 2).to(query.dtype)

    def _tail_logits(self, query: Tensor, logits: Logits, chosen: Chosen) -> Tensor:
        """[B, Hkv, G, C] float32: the logit of each cluster's mean key, plus the log of how many it stands for."""
        assert self.clusters
        keys, sizes, of = (self.rows[f"cluster.{name}"].view for name in ("key", "size", "of"))
        batch = torch.arange(of.shape[0], device=of.device).view(-1, 1, 1, 1)
        heads = torch.arange(of.shape[1], device=of.device).view(1, -1, 1, 1)
        # What was never clustered has no entry, or a stale one.
        slot = chosen.index.clamp_max(of.shape[2] - 1)
        owner = of[batch, heads, slot].squeeze(-1).long()
        self._read += keys.nbytes + sizes.nbytes + owner.numel() * of.element_size()
        counts = ~self._open(chosen.index)
        if chosen.counted is not None:
            counts &= chosen.counted
        left = sizes.squeeze(-1).unsqueeze(2).expand(-1, -1, owner.shape[2], -1).to(torch.int64, copy=True)
        left.scatter_add_(-1, owner.clamp(0, left.shape[-1] - 1), -counts.to(torch.int64))
        left.masked_fill_(~self.clusters.there(left.device).unsqueeze(2), 0)
        return logits.of(self._grouped(query) @ keys.mT) + left.float().log()

    def _grouped(self, query: Tensor) -> Tensor:
        """[B, Hq, 1, D] -> [B, Hkv, G, D], as the stored keys are encoded."""
        return self._encode_query(query).unflatten(1, (self.rows["key"].view.shape[1], -1)).squeeze(3)

    def _forget(self) -> None:
        if self.clusters:
            self.clusters.undo(self.lengths)

    def select(self, index: Tensor) -> None:
        if self.clusters:
            self.clusters.select(index.tolist())
        super().select(index)
        if self.clusters:
            self.clusters.shorten()

    def state(self) -> dict[str, Tensor]:
        return {**super().state(), **(self.clusters.state() if self.clusters else {})}

    def restore(self, state: dict[str, Tensor]) -> None:
        super().restore(state)
        if self.clusters:
            self.clusters.restore(state)
