"""ClusterKV: whole clusters by their mean keys, sinks and the open window, at fixed addresses."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.attend import attend, window
from ...kernels.dense import dense
from ..attention import Logits
from ..stores.clusterkv import ClusterKVStore
from .clock import Clock, most
from .step import Step, kernel_logits


class ClusterKVStep(Step):
    """Between windows the clusters stand still; the host closes a window when it is full."""

    store: ClusterKVStore

    def __init__(self, store: ClusterKVStore, clock: Clock):
        super().__init__(store, clock)
        self._closed = torch.zeros_like(clock.held)
        """[B] tokens before the open window."""
        self._counts = torch.zeros_like(clock.held)
        """[B] clusters."""

    def attend(self, query: Tensor, logits: Logits) -> Tensor:
        key, value, seen = self.buffer("key"), self.buffer("value"), self.clock.seen
        if "cluster.key" not in self.store.rows:  # no row is longer than its sinks and a window
            return dense(query, key, value, seen, **kernel_logits(logits))
        selection = self.store.selection
        sinks = seen.clamp_max(selection.sinks)
        begin = torch.maximum(self._closed, sinks)
        # Its length bounds the programs that a launch spends on it.
        longest = selection.window + 1
        recent = window(query, key, value, begin, seen, scaling=logits.scaling, softcap=logits.softcap, most=longest)
        room = (self.clock.budgets(selection) - sinks - (seen - begin)).clamp_min(0)
        index, count = self._recall(self._scores(query, logits), room, sinks)
        return attend(query, key, value, index, count, extra=[recent], **kernel_logits(logits))

    def _scores(self, query: Tensor, logits: Logits) -> Tensor:
        """[B, Hkv, G or 1, C] float32 of the clusters, -inf where a row has none."""
        centroids = self.buffer("cluster.key")
        there = torch.arange(centroids.shape[2], device=query.device) < self._counts.view(-1, 1, 1, 1)
        scores = logits.of(query.float() @ centroids.float().mT).masked_fill(~there, -torch.inf)
        if self.store.selection.select == "group":
            # A row without clusters would divide by nothing.
            return scores.log_softmax(-1).logsumexp(2, keepdim=True).masked_fill(~there, -torch.inf)
        return scores.amax(2, keepdim=True) if self.store.selection.select == "max" else scores

    def _recall(self, scores: Tensor, room: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
        """Sinks, then whole clusters by score until `room` [B] is filled, of the last one its first tokens.

        Returns:
            (slots [B, Hkv, K] or [B, Hkv, G, K], how many count).
        """
        device, selection = scores.device, self.store.selection
        there = torch.arange(scores.shape[-1], device=device) < self._counts.view(-1, 1, 1)
        size = self.buffer("cluster.size").squeeze(-1).long() * there
        start = (size.cumsum(-1) - size + selection.sinks).unsqueeze(2).expand_as(scores)
        order = scores.argsort(dim=-1, descending=True, stable=True)
        ordered = size.unsqueeze(2).expand_as(scores).gather(-1, order)
        filled = ordered.cumsum(-1)
        slot_of = torch.arange(most(selection, self.capacity) + selection.sinks, device=device)
        rank_of = (slot_of - sinks.view(-1, 1, 1, 1)).expand(*scores.shape[:3], -1).contiguous()
        rank = torch.searchsorted(filled, rank_of, right=True).clamp_max(scores.shape[-1] - 1)
        within = rank_of - (filled - ordered).gather(-1, rank)
        recalled = start.gather(-1, order.gather(-1, rank)) + within
        taken = torch.minimum(room.view(-1, 1, 1), filled[..., -1])
        index = torch.where(rank_of < 0, slot_of, recalled)
        count = taken + sinks.view(-1, 1, 1)
        index = index.masked_fill(slot_of >= count.unsqueeze(-1), 0)
        if selection.select != "head":
            index, count = index.squeeze(2), count.squeeze(2)
        return index.to(torch.int32), count.to(torch.int32)

    def reserve(self, capacity: int) -> None:
        super().reserve(capacity)
        self._close()  # not when the store is settled: a turn that comes then is clustered with the open window
        clusters, selection = self.store.clusters, self.store.selection
        # No window that closes makes more clusters than this: windows only grow with the row.
        shortest = min(self.store.lengths)
        more = -(-(capacity - shortest) // min(selection.window_of(shortest), selection.tokens_per_cluster)) + 1
        for name in ("cluster.key", "cluster.value", "cluster.size"):
            if name in self.store.rows:
                self.store.rows[name].reserve(max(clusters.counts) + more, self.store.rows[name].view)

    def due(self, tokens: int) -> bool:
        lengths = [length + tokens for length in self.store.lengths]
        windows = [self.store.selection.window_of(length) for length in lengths]
        return any(self.store.clusters.due(lengths, windows, [True] * len(lengths)))

    def settle(self, tokens: int) -> None:
        first = list(self.store.lengths)
        super().settle(tokens)
        position = self.buffer("position")
        for row, (begin, end) in enumerate(zip(first, self.store.lengths, strict=True)):
            position[row, :, begin:end, 0] = torch.arange(begin, end, device=position.device, dtype=position.dtype)

    def _close(self) -> None:
        """Cluster what is due before the next token."""
        self.store.close_windows([True] * len(self.store.lengths))
        store = self.store
        self._closed.copy_(torch.tensor(store.clusters.upto))
        self._counts.copy_(torch.tensor(store.clusters.counts))

    @property
    def per_token(self) -> tuple[str, ...]:
        return ("key", "value", "position")
