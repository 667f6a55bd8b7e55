"""Saved clusters: the books say when tokens were clustered, which follows from how they came; of every token its
cluster, one of those that were made when it was clustered."""

from __future__ import annotations

import torch

from ...artifacts import KvcalError
from ..kv.saved import Saved, require
from .clusters import Clusters

Entries = list[tuple[int, int]]
OF = "clusters.of"


def check_clusters(saved: Saved, clusters: Clusters) -> None:
    """Raises KvcalError: other clusters than the tokens can have."""
    closed = _check_books(saved, clusters)
    ends = [entries[-1][0] if entries else 0 for entries in closed]
    if not any(ends):
        return
    of = saved.take(OF, torch.int32, *saved.key.shape[:2], max(ends))
    slot = torch.arange(max(ends))
    for row, entries in enumerate(closed):
        least, most = torch.full_like(slot, -1), torch.full_like(slot, -1)
        begin, count = clusters.sinks, 0
        for end, total in entries:
            least[begin:end], most[begin:end] = count, total - 1
            begin, count = end, total
        require(OF, (of[row] >= least) & (of[row] <= most), f"clusters of row {row} that were made with the token")


def _check_books(saved: Saved, clusters: Clusters) -> list[Entries]:
    """The clusterings of each sequence. Raises KvcalError: other ones than its tokens lead to."""
    prompts, closed = (_entries(saved, f"clusters.{name}") for name in ("prompts", "closed"))
    for row, (length, came, stated) in enumerate(zip(saved.lengths, prompts, closed, strict=True)):
        before = -1
        for begin, end in came:
            if not before < begin < end <= length:
                raise KvcalError(f"clusters.prompts: slots {begin} to {end} of row {row}, which has {length} tokens")
            before = end
        made = _closings(clusters, came, length, coming=False)
        # What is due may have been clustered already, before a token that has not come; and a segment that ends where a
        # cache was cropped to is clustered again with the next token.
        cropped = made[:-1] if made and made[-1][0] == length else made
        if stated not in (made, cropped, _closings(clusters, came, length, coming=True)):
            raise KvcalError(f"clusters.closed: row {row} of {length} tokens is not clustered at such slots")
    return closed


def _entries(saved: Saved, name: str) -> list[Entries]:
    """Of each sequence, in their order."""
    found = saved.take(name, torch.int64, None, 3)
    row = found[:, 0]
    require(name, (row >= 0) & (row < saved.rows), f"a row of {saved.rows}")
    require(name, row[1:] >= row[:-1], "rows in order")
    by_row: list[Entries] = [[] for _ in range(saved.rows)]
    for at, first, second in found.tolist():
        by_row[at].append((first, second))
    return by_row


def _closings(clusters: Clusters, prompts: Entries, length: int, coming: bool) -> Entries:
    """What `Clusters` makes of a sequence of so many tokens, of which these came as prompts.

    Args:
        coming: whether it has seen to the next token already.
    """
    found: Entries = []
    upto = count = came = slot = 0
    ends = dict(prompts)

    def close(end: int) -> None:
        nonlocal upto, count
        first = max(upto, clusters.sinks)
        while first < end:
            upto = min(first + clusters.segment, end)
            count += clusters.number(upto - first)
            found.append((upto, count))
            first = upto

    while slot < length + coming:
        if slot in ends and slot < length:
            slot = came = ends[slot]
            first = max(upto, min(clusters.sinks, slot))
            close(first + (slot - first) // clusters.segment * clusters.segment)
            continue
        first = max(upto, min(clusters.sinks, slot))
        if slot > first and (slot - first >= clusters.window_of(slot) or came > first):
            close(slot)
        slot += 1
    return found
