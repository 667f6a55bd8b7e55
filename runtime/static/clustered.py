"""Steps over tokens that are in clusters: which are open, when the host has to cluster again, what the tail adds."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.attend import Partial, tail
from ..attention import Logits
from ..stores.clustered import ClusteredStore
from ..stores.clusters import is_per_cluster
from ..stores.tail import OWNER
from .clock import Clock
from .step import Step

ALIGNED = 16
"""Clusters by whose multiples buffers grow."""


@dataclass(frozen=True)
class Open:
    """The tokens that are in no cluster and always read: the sinks, and the window since the last clustering."""

    sinks: Tensor
    """[B] int32: how many, and where the clustered tokens begin."""
    window: Tensor
    """[B] int32: where they end and the window begins."""
    runs: tuple[Tensor, Tensor]
    """Starts and sizes [B, 2] int32 of both."""
    number: Tensor
    """[B] int32"""


class ClusteredStep(Step):
    """Between windows the clusters stand still; the host closes a window when it is full. Without clusters: a Step."""

    store: ClusteredStore

    def __init__(self, store: ClusteredStore, clock: Clock):
        super().__init__(store, clock)
        self._closed = torch.zeros_like(clock.held)
        """[B] tokens before the open window."""
        self._counts = torch.zeros_like(clock.held)
        """[B] clusters."""
        self._kept: dict[str, Tensor] = {}
        """What follows from the clusters alone, at fixed addresses."""

    @property
    def clustered(self) -> bool:
        """False: no row is longer than its sinks and a window."""
        return "cluster.key" in self.store.rows

    def place(self) -> Hashable:
        """The same for all layers whose windows began together and will end together, for as long as a graph lives."""
        assert self.store.clusters is not None
        return self.store.selection, tuple(self.store.clusters.upto)

    def open(self) -> Open:
        """Reckoned once for all layers of a step."""
        return self.clock.once(("open", self.place()), self._open)

    def _open(self) -> Open:
        seen = self.clock.seen
        sinks = seen.clamp_max(self.store.selection.sinks)
        window = torch.maximum(self._closed, sinks)
        starts, sizes = torch.stack((torch.zeros_like(window), window), 1), torch.stack((sinks, seen - window), 1)
        return Open(sinks, window, (starts, sizes), sizes.sum(1, dtype=torch.int32))

    def tail(self, query: Tensor, unread: Tensor, logits: Logits) -> Partial:
        """What is not read, through its clusters. Args: unread: [B, Hkv, C] or [B, Hkv, G, C] float32."""
        means = self.buffer("cluster.key"), self.buffer("cluster.value")
        return tail(query, *means, unread, scaling=logits.scaling, softcap=logits.softcap)

    def reserve(self, capacity: int) -> None:
        super().reserve(capacity)
        clusters, selection, rows = self.store.clusters, self.store.selection, self.store.rows
        if clusters is None:
            return
        self._close()  # not when the store is settled: a turn that comes then is clustered with the open window
        # No window that closes makes more clusters than this: windows only grow with the row.
        shortest = min(self.store.lengths)
        more = -(-(capacity - shortest) // min(selection.window_of(shortest), selection.tokens_per_cluster)) + 1
        for name in filter(is_per_cluster, rows):
            # Kernels read 16 bytes at a time where rows begin at multiples of them.
            rows[name].reserve(-(-(max(clusters.counts) + more) // ALIGNED) * ALIGNED, rows[name].view)
        if OWNER in rows:
            rows[OWNER].reserve(capacity, rows[OWNER].view)
        if self.clustered:
            size = self.buffer("cluster.size").squeeze(-1)
            there = torch.arange(size.shape[-1], device=size.device) < self._counts.view(-1, 1, 1)
            self._derive(size * there)

    def _derive(self, size: Tensor) -> None:
        """Work out what depends on the clusters. Args: size: [B, Hkv, C] int32, 0 where a row has no cluster."""

    def keep(self, name: str, tensor: Tensor) -> None:
        if name in self._kept and self._kept[name].shape == tensor.shape:
            self._kept[name].copy_(tensor)
        else:
            self._kept[name] = tensor.contiguous()

    def addresses(self) -> tuple[tuple[int, int], ...]:
        return super().addresses() + tuple((of.data_ptr(), of.shape[-1]) for of in self._kept.values())

    def settle(self, tokens: int) -> None:
        first = list(self.store.lengths)
        super().settle(tokens)
        if "position" in self.per_token:
            position = self.buffer("position")
            for row, (begin, end) in enumerate(zip(first, self.store.lengths, strict=True)):
                position[row, :, begin:end, 0] = torch.arange(begin, end, device=position.device, dtype=position.dtype)

    def due(self, tokens: int) -> bool:
        if self.store.clusters is None:
            return False
        lengths = [length + tokens for length in self.store.lengths]
        windows = [self.store.selection.window_of(length) for length in lengths]
        return any(self.store.clusters.due(lengths, windows, [True] * len(lengths)))

    def _close(self) -> None:
        """Cluster what is due before the next token."""
        clusters = self.store.clusters
        assert clusters is not None
        self.store.close_windows([True] * len(self.store.lengths))
        self._closed.copy_(torch.tensor(clusters.upto))
        self._counts.copy_(torch.tensor(clusters.counts))
