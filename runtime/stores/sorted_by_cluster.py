"""Stores whose tokens lie sorted by cluster, so that a cluster is one contiguous read.

Slots of a row are its sinks, then cluster after cluster, then the open window in order of arrival.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...artifacts import Artifact
from ..attention import Logits
from ..kv.buffers import Places, TokenBuffer
from ..kv.offload import DeviceCache, HostBuffer
from .amounts import check_choice, check_count
from .clustered import Clustered, ClusteredStore
from .clusters import SEGMENT, Clusters, slot_index, take
from .saved import Saved, require
from .saved_clusters import SavedClusters
from .selecting import Chosen
from .tail import OWNER


@dataclass(frozen=True)
class Sorted(Clustered):
    segment: int = SEGMENT
    """Tokens of a prompt that are clustered together at most."""
    iterations: int = 20
    """Passes of k-means at most."""
    offload: str = "none"
    """"cpu": keys and values lie in host memory, and only what is read and not cached on the device is copied."""
    cached: int = 2048
    """With `offload`: tokens per KV head that are cached on the device."""

    def check(self) -> None:
        super().check()
        check_count("iterations", self.iterations, 1)
        check_count("segment", self.segment, 1)
        check_choice("offload", self.offload, ("none", "cpu"))
        check_count("cached", self.cached, 1)


def calibrated_centroids(artifact: Artifact | None, layer: int) -> Tensor | None:
    """[Hkv, C, D] of the stage `clusters`, if there is one: what online clusterings begin with."""
    if artifact is None or "clusters" not in artifact.stages:
        return None
    return artifact.tensor("clusters", layer, "centroids")


class SortedStore(ClusteredStore):
    selection: Sorted
    clusters: Clusters

    def __init__(self, settings: Sorted, start: Tensor | None):
        # Before the rest: `_make_clusters` and `_buffer` look at them.
        self._start = start
        self.device_cache = DeviceCache(settings.cached) if settings.offload == "cpu" else None
        super().__init__(settings)

    def _make_clusters(self) -> Clusters:
        of = self.selection
        return Clusters(
            self.rows,
            self._buffer,
            of.tokens_per_cluster,
            of.sinks,
            start=self._start,
            iterations=of.iterations,
            segment=of.segment,
        )

    def read_mask(self) -> Tensor:
        by_slot = super().read_mask()
        position = self.rows["position"].view.squeeze(-1).long()
        position = position.repeat_interleave(by_slot.shape[1] // position.shape[1], 1)
        # Slots beyond a shorter row have stale positions: add instead of set.
        read = torch.zeros(by_slot.shape, dtype=torch.int32, device=by_slot.device)
        return read.scatter_add_(2, position, by_slot.to(torch.int32)) > 0

    def recall(self, scores: Tensor, room: Sequence[int]) -> Chosen:
        """Clusters in descending order of score until the room is full; of the last one its first tokens.

        Args:
            scores: [B, Hkv, G or 1, C], -inf where a row has no such cluster.
            room: tokens of each row.
        """
        device = scores.device
        size = self.clusters.sizes.long() * self.clusters.there(device)
        start = (size.cumsum(-1) - size + self.selection.sinks).unsqueeze(2).expand_as(scores)
        order = scores.argsort(dim=-1, descending=True, stable=True)
        ordered = size.unsqueeze(2).expand_as(scores).gather(-1, order)
        filled = ordered.cumsum(-1)
        most = torch.tensor(room, device=device).view(-1, 1, 1, 1)
        rank_of = torch.arange(max(0, *room), device=device).expand(*scores.shape[:3], -1).contiguous()
        counted = rank_of < torch.minimum(most, filled[..., -1:])
        rank = torch.searchsorted(filled, rank_of, right=True).clamp_max(scores.shape[-1] - 1)
        within = rank_of - (filled - ordered).gather(-1, rank)
        slot = start.gather(-1, order.gather(-1, rank)) + within
        return Chosen(slot.masked_fill(~counted, 0), counted)

    def _close(self, clusters: Clusters, slots: list[range]) -> None:
        """Cluster these slots and sort them by cluster."""
        labels = clusters.add(slots, self._device)
        by_cluster = labels.masked_fill(labels < 0, torch.iinfo(labels.dtype).max)
        self._permute(slots, by_cluster)
        if self.tail:
            self.tail.remember(slots, by_cluster.sort(dim=-1, stable=True).values, self.lengths)

    def _permute(self, slots: Sequence[range], order_by: Tensor) -> None:
        """Sort the tokens of each row's slots by `order_by` [B, Hkv, L], the largest where a row has fewer."""
        device = order_by.device
        index, held = slot_index(slots, device)
        order = order_by.argsort(dim=-1, stable=True)
        row, _, token = held.nonzero(as_tuple=True)
        places = Places(self.lengths, (row, token, index[row, 0, token]), None)
        for name in ("key", "value", "position"):
            rows = self.rows[name]
            rows.write(take(take(rows.view, index), order), places)
        if self.device_cache:
            self.device_cache.drop(slots)

    def _check_order(self, saved: Saved, found: SavedClusters | None) -> None:
        name = "position"
        position = saved.take(f"rows.{name}", torch.int32, *saved.key.shape[:3], 1).squeeze(-1).long()
        require(name, (position >= 0) & (position < saved.longest), f"0 to {saved.longest - 1}")
        slots = torch.arange(saved.longest)
        for row, length in enumerate(saved.lengths):
            own, slot = position[row, :, :length], slots[:length].expand(position.shape[1], -1)
            require(name, own < length, f"0 to {length - 1} in row {row}")
            runs = found.runs(row, length) if found is not None else slot
            there = torch.zeros_like(own).scatter_add_(1, own, torch.ones_like(own))
            require(name, there == 1, f"every token of row {row} once")
            closed = [upto for upto, _ in found.closed[row]] if found is not None else []
            ends = torch.tensor([min(self.selection.sinks, length), *closed])
            window, of_slot = (torch.bucketize(at.contiguous(), ends, right=True) for at in (own, slot))
            require(name, window == of_slot, f"tokens of row {row} in the window in which they were clustered")
            rises = (own[:, 1:] > own[:, :-1]) | (runs[:, 1:] != runs[:, :-1])
            require(name, rises, f"tokens of row {row} in order of arrival within a cluster")

    def _check_owners(self, saved: Saved, found: SavedClusters, owners: list[Tensor]) -> list[Tensor]:
        for stated, owner in zip(super()._check_owners(saved, found, owners), owners, strict=True):
            require(OWNER, stated == owner, "clusters in order")
        return owners

    def _buffer(self, name: str) -> TokenBuffer:
        return HostBuffer() if self.device_cache and name in ("key", "value") else super()._buffer(name)

    def _whole(self, name: str) -> Tensor:
        return self.rows[name].view.to(self._device)

    def attend_densely(self, query: Tensor, logits: Logits) -> Tensor:
        if self.device_cache:  # all of it comes from the host
            self.device_cache.misses += sum(self.lengths) * self.rows["key"].view.shape[1]
        return super().attend_densely(query, logits)

    def _gather(self, names: Sequence[str], chosen: Chosen) -> list[Tensor]:
        if self.device_cache is None:
            return super()._gather(names, chosen)
        host = {name: self.rows[name] for name in names}
        gathered = self.device_cache.gather(host, chosen.index, chosen.counted)
        self._read += sum(tokens.nbytes for tokens in gathered.values())
        return [gathered[name].flatten(1, 2) for name in names]

    def resident_bytes(self) -> int:
        """On the device: what is offloaded is in `host_bytes`."""
        cached = self.device_cache.nbytes() if self.device_cache else 0
        return super().resident_bytes() - self.host_bytes() + cached

    def host_bytes(self) -> int:
        return sum(rows.nbytes() for rows in self.rows.values() if isinstance(rows, HostBuffer))

    def to(self, device: torch.device | str) -> None:
        super().to(device)
        if self.device_cache:
            self.device_cache.clear()

    def select(self, index: Tensor) -> None:
        if self.device_cache:
            self.device_cache.clear()
        super().select(index)

    def _extended(self, key: Tensor, value: Tensor, places: Places) -> None:
        slots = torch.arange(max(self.lengths), device=key.device)
        if isinstance(places.slots, slice):
            position = slots[places.slots].expand(key.shape[0], -1)
        else:
            row, token, slot = places.slots
            position = torch.zeros(key.shape[0], key.shape[2], dtype=torch.int64, device=key.device)
            position[row, token] = slot
        new = position[:, None, :, None].expand(-1, key.shape[1], -1, -1).to(torch.int32)
        self.rows.setdefault("position", self._buffer("position")).write(new, places)

    def _forget(self) -> None:
        undone = self.clusters.undo(self.lengths)
        slots = [range(max(begin, min(self.selection.sinks, end)), end) for begin, end in undone]
        if any(slots):
            index, held = slot_index(slots, self._device)
            position = take(self.rows["position"].view, index).squeeze(-1)
            self._permute(slots, position.masked_fill(~held, torch.iinfo(position.dtype).max))
        if self.tail:
            self.tail.shorten()
        self.rows["position"].used = max(self.lengths)
        if self.device_cache:
            # What comes in place of the tokens that are gone has their slots.
            self.device_cache.drop([range(length, self.rows["key"].used) for length in self.lengths])
