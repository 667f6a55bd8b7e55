"""Stores whose tokens are in clusters: they select among the clustered tokens and read all others besides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention import Logits
from ..kv.buffers import CHUNK, TokenBuffer
from .amounts import check_count, check_flag
from .clusters import Clusters, is_per_cluster
from .full import FullStore
from .saved import Saved, require
from .saved_clusters import SavedClusters, check_clusters, check_means
from .selecting import Chosen, SelectingStore, Selection
from .tail import OWNER, Remainder, Tail


@dataclass(frozen=True)
class Clustered(Selection):
    tail: bool = False
    """What is not read contributes through its cluster."""
    tokens_per_cluster: int = 80
    window: int = 64
    """Decoded tokens that are clustered together once there are so many, or once they and the sinks take half of what
    is read; until then they are read exactly."""
    sinks: int = 4
    """First tokens, in no cluster and read exactly."""

    def check(self) -> None:
        super().check()
        check_flag("tail", self.tail)
        check_count("tokens_per_cluster", self.tokens_per_cluster, 1)
        check_count("window", self.window, 1)
        check_count("sinks", self.sinks)

    def window_of(self, length: int) -> int:
        """Decoded tokens after which a row of so many tokens is clustered again."""
        return max(1, min(self.window, self.of(length) // 2 - self.sinks))


class ClusteredStore(SelectingStore):
    """Without clusters, as without a tail, it is a plain `SelectingStore`."""

    selection: Clustered

    def __init__(self, selection: Clustered):
        super().__init__(selection)
        self.clusters = self._make_clusters()
        self.tail = Tail(self.rows, self.clusters) if selection.tail and self.clusters else None

    def _make_clusters(self) -> Clusters | None:
        of = self.selection
        return Clusters(self.rows, self._buffer, of.tokens_per_cluster, of.sinks) if of.tail else None

    def _buffer(self, name: str) -> TokenBuffer:
        """Clusters are fewer than tokens, and their buffers grow accordingly."""
        if is_per_cluster(name):
            return TokenBuffer(chunk=-(-CHUNK // self.selection.tokens_per_cluster))
        return super()._buffer(name)

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
        self.close_windows([True] * key.shape[0] if valid is None else valid[:, 0].tolist())
        super().append(key, value, valid)

    def close_windows(self, coming: Sequence[bool]) -> None:
        """Cluster what is due in the rows that are `coming` by their next token."""
        if self.clusters is None:
            return
        windows = [self.selection.window_of(length) for length in self.lengths]
        slots = self.clusters.due(self.lengths, windows, coming)
        if any(slots):
            self._close(self.clusters, slots)

    def attend(self, query: Tensor, logits: Logits) -> Tensor:
        if self.clusters and not any(self.clusters.counts):
            return self.attend_densely(query, logits)
        return super().attend(query, logits)

    def _close(self, clusters: Clusters, slots: list[range]) -> None:
        """Cluster these slots of each row."""
        labels = clusters.add(slots, self._device)
        if self.tail:
            self.tail.remember(slots, labels, self.lengths)

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
        chosen = self._choose(self._hide_open(scores, self.clusters), left)
        always = always[:, None, None].expand(*chosen.index.shape[:3], -1)
        counted = self._clustered(chosen, self.clusters)
        return Chosen(torch.cat((always.clamp_min(0), chosen.index), -1), torch.cat((always >= 0, counted), -1))

    def _clustered(self, chosen: Chosen, clusters: Clusters) -> Tensor:
        """[B, Hkv, G or 1, k] bool: which of the chosen count, and are in a cluster."""
        clustered = ~clusters.leave_out(chosen.index)
        return clustered if chosen.counted is None else clustered & chosen.counted

    def _hide_open(self, scores: Tensor, clusters: Clusters) -> Tensor:
        """Scores by token, without those that are read anyway."""
        slot = torch.arange(scores.shape[-1], device=scores.device).view(1, 1, 1, -1)
        return scores.masked_fill(clusters.leave_out(slot.expand(scores.shape[0], -1, -1, -1)), -torch.inf)

    def _combine(self, query: Tensor, logits: Logits, own: Tensor, chosen: Chosen) -> Tensor:
        if not self.selection.tail:
            return super()._combine(query, logits, own, chosen)
        key, value = self._gather(("key", "value"), chosen)
        key = key.unflatten(1, chosen.index.shape[1:3]).float()
        exact = logits.of(self._grouped(query).float().unsqueeze(3) @ key.mT).squeeze(3)
        return self._weigh(query, logits, exact, value, chosen, self._rest(query, logits, own, chosen))

    def _weigh(
        self, query: Tensor, logits: Logits, exact: Tensor, value: Tensor, chosen: Chosen, rest: Remainder | None
    ) -> Tensor:
        """Softmax over the chosen tokens, and over what the tail makes of the others.

        Args:
            exact: [B, Hkv, G, k] float32, logits of the chosen tokens.
            value: [B, Hkv·(G or 1), k, Dv], theirs.
        """
        if chosen.counted is not None:
            exact = exact.masked_fill(~chosen.counted, -torch.inf)
        value = value.unflatten(1, chosen.index.shape[1:3]).float()
        if rest is None:
            return (logits.softmax(exact).unsqueeze(3) @ value).flatten(1, 2).to(query.dtype)
        weights = logits.softmax(torch.cat((exact, rest.logits), -1)).unsqueeze(3)
        count = exact.shape[-1]
        out = weights[..., :count] @ value + weights[..., count:] @ rest.values.float().unsqueeze(2)
        return out.flatten(1, 2).to(query.dtype)

    def _rest(self, query: Tensor, logits: Logits, own: Tensor, chosen: Chosen) -> Remainder | None:
        """What the tail makes of the tokens that are not chosen; None without one."""
        if self.tail is None or self.clusters is None:
            return None
        means = self._mean_logits(query, logits, own, self.clusters)
        rest = self.tail.remainder(means, chosen.index, self._clustered(chosen, self.clusters))
        self._read += rest.bytes_read
        return rest

    def _mean_logits(self, query: Tensor, logits: Logits, own: Tensor, clusters: Clusters) -> Tensor:
        """[B, Hkv, G, C] float32 logits of the clusters' mean keys."""
        self._read += clusters.keys.nbytes + clusters.sizes.nbytes
        return logits.of(self._grouped(query).float() @ clusters.keys.float().mT)

    def _grouped(self, query: Tensor) -> Tensor:
        """[B, Hq, 1, D] -> [B, Hkv, G, D], as the stored keys are encoded."""
        return self._encode_query(query).unflatten(1, (self.rows["key"].view.shape[1], -1)).squeeze(3)

    def _forget(self) -> None:
        if self.clusters:
            self.clusters.undo(self.lengths)
        if self.tail:
            self.tail.shorten()

    def select(self, index: Tensor) -> None:
        if self.clusters:
            self.clusters.select(index.tolist())
        super().select(index)
        if self.clusters:
            self.clusters.shorten()
        if self.tail:
            self.tail.shorten()

    def _check(self, saved: Saved) -> None:
        super()._check(saved)
        if self.clusters is None:
            return
        found = check_clusters(saved, self.clusters, self.selection.window_of)
        self._check_order(saved, found)
        if found is None:
            return
        owners = [found.owners(row) for row in range(saved.rows)]
        if self.selection.tail and self.tail:
            owners = self._check_owners(saved, found, owners)
        self._check_means(saved, found, owners)

    def _check_order(self, saved: Saved, found: SavedClusters | None) -> None:
        """Where tokens lie; here in order of arrival."""

    def _check_owners(self, saved: Saved, found: SavedClusters, owners: list[Tensor]) -> list[Tensor]:
        """Of each row [Hkv, n] the cluster of each clustered token, of which a cluster has as many as its size says."""
        of = saved.take(f"rows.{OWNER}", torch.int32, *saved.key.shape[:2], None, 1).squeeze(-1).long()
        longest = max(found.upto)
        require(OWNER, torch.tensor(longest <= of.shape[2] <= saved.longest), f"{longest} to {saved.longest} tokens")
        stated = [of[row, :, self.selection.sinks : end] for row, end in enumerate(found.upto)]
        for row, (owner, wanted) in enumerate(zip(stated, owners, strict=True)):
            require(OWNER, owner.sort(-1).values == wanted, f"as many tokens of row {row} as each cluster has")
        return stated

    def _check_means(self, saved: Saved, found: SavedClusters, owners: list[Tensor]) -> None:
        for name, rows in (("cluster.key", saved.key), ("cluster.value", saved.value)):
            shape = (*rows.shape[:2], found.sizes.shape[2], rows.shape[3])
            check_means(name, saved.take(f"rows.{name}", rows.dtype, *shape), rows, owners, found)

    def state(self) -> dict[str, Tensor]:
        return {**super().state(), **(self.clusters.state() if self.clusters else {})}

    def restore(self, state: dict[str, Tensor]) -> None:
        super().restore(state)
        if self.clusters:
            self.clusters.restore(state)
