"""Saved clusters: the books say when tokens were clustered, which follows from how they came; sizes say of how many
tokens each cluster is, and the store knows which these are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...artifacts import KvcalError
from .clusters import Clusters
from .saved import Saved, require, require_close

Entries = list[tuple[int, int]]


@dataclass(frozen=True)
class SavedClusters:
    """Books and sizes that have been checked."""

    closed: list[Entries]
    """As `Clusters` has them: of each row, after each of its clusterings, (tokens before the open window, clusters)."""
    sizes: Tensor
    """[B, Hkv, C] int64, 0 where a row has no such cluster."""
    sinks: int

    @property
    def upto(self) -> list[int]:
        return [closed[-1][0] if closed else 0 for closed in self.closed]

    def runs(self, row: int, length: int) -> Tensor:
        """[Hkv, length] what tokens lie together in order of arrival: the sinks, each cluster, the open window."""
        owners = self.owners(row) + 1
        sinks = owners.new_zeros(len(owners), min(self.sinks, length))
        opened = owners.new_full((len(owners), length - sinks.shape[1] - owners.shape[1]), self.sizes.shape[2] + 1)
        return torch.cat((sinks, owners, opened), 1)

    def owners(self, row: int) -> Tensor:
        """[Hkv, n] the cluster of each clustered token of a row whose tokens lie by cluster."""
        clusters = torch.arange(self.sizes.shape[2])
        return torch.stack([clusters.repeat_interleave(sizes) for sizes in self.sizes[row]])


def check_books(saved: Saved, clusters: Clusters, window_of: Callable[[int], int]) -> list[Entries]:
    """The clusterings of each row. Raises KvcalError: other ones than the row's tokens lead to."""
    prompts, closed = (_entries(saved, f"clusters.{name}") for name in ("prompts", "closed"))
    if not prompts and not closed:
        prompts = closed = [[] for _ in saved.lengths]
    for row, (length, came, stated) in enumerate(zip(saved.lengths, prompts, closed, strict=True)):
        before = -1
        for begin, end in came:
            if not before < begin < end <= length:
                raise KvcalError(f"clusters.prompts: slots {begin} to {end} of row {row}, which has {length} tokens")
            before = end
        # The open window may have been closed already, before a token that has not come.
        if not any(stated == _closings(clusters, came, length + coming, window_of) for coming in (0, 1)):
            raise KvcalError(f"clusters.closed: row {row} of {length} tokens is not clustered at such slots")
    return closed


def check_clusters(saved: Saved, clusters: Clusters, window_of: Callable[[int], int]) -> SavedClusters | None:
    """Books and sizes; None where nothing is clustered yet. Raises KvcalError."""
    closed = check_books(saved, clusters, window_of)
    counts = [entries[-1][1] if entries else 0 for entries in closed]
    if not any(counts):
        return None
    name, most = "cluster.size", max(counts)
    sizes = saved.take(f"rows.{name}", torch.int32, *saved.key.shape[:2], most, 1).squeeze(-1).long()
    there = torch.arange(most) < torch.tensor(counts).view(-1, 1, 1)
    sizes = sizes.masked_fill(~there, 0)
    require(name, sizes >= 0, "no negative size")
    for row, entries in enumerate(closed):
        if entries:
            upto, count = torch.tensor(entries).unbind(1)
            held = sizes[row].cumsum(-1)[:, count - 1]
            require(
                f"{name} (of row {row}, summed up)", held == upto - clusters.sinks, "the tokens that were clustered"
            )
    return SavedClusters(closed, sizes, clusters.sinks)


def check_means(name: str, stated: Tensor, rows: Tensor, owners: Sequence[Tensor], found: SavedClusters) -> None:
    """Means [B, Hkv, C, D] of the clusters' tokens are those of `rows` [B, Hkv, S, D], see `means_of`."""
    means = means_of(rows, owners, found)
    there = (found.sizes > 0).unsqueeze(-1)
    require_close(name, stated.double() * there, means * there, stated.dtype)


def means_of(rows: Tensor, owners: Sequence[Tensor], found: SavedClusters) -> Tensor:
    """[B, Hkv, C, D] float64. Args: owners: of each row [Hkv, n], of its tokens from the sinks on."""
    sums = torch.zeros(*found.sizes.shape, rows.shape[-1], dtype=torch.float64)
    for row, owner in enumerate(owners):
        tokens = rows[row, :, found.sinks : found.sinks + owner.shape[1]].double()
        sums[row].scatter_add_(1, owner.unsqueeze(-1).expand_as(tokens), tokens)
    return sums / found.sizes.clamp_min(1).unsqueeze(-1)


def _entries(saved: Saved, name: str) -> list[Entries]:
    """Of each row, in the order of rows."""
    found = saved.take(name, torch.int64, None, 3)
    row = found[:, 0]
    require(name, (row >= 0) & (row < saved.rows), f"a row of {saved.rows}")
    require(name, row[1:] >= row[:-1], "rows in order")
    by_row: list[Entries] = [[] for _ in range(saved.rows)]
    for at, first, second in found.tolist():
        by_row[at].append((first, second))
    return by_row


def _closings(clusters: Clusters, prompts: Entries, length: int, window_of: Callable[[int], int]) -> Entries:
    """What `Clusters.due` and `add` make of a row of so many tokens, of which these came as prompts."""
    found: Entries = []
    upto = count = came = 0
    ends = dict(prompts)
    slot = 0
    while slot < length:
        if slot in ends:
            slot = came = ends[slot]
            continue
        first = max(upto, min(clusters.sinks, slot))
        if slot > first and (slot - first >= window_of(slot) or came > first):
            upto, count = slot, count + clusters.number(slot - first)
            found.append((upto, count))
        slot += 1
    return found
