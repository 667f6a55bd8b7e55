"""Checks of saved clusters. The bookkeeping says when tokens were clustered, which follows from how they came; the
cluster of each token has to be one of those that were made when it was clustered."""

from __future__ import annotations

import torch

from ...artifacts import KvcalError
from ..kv.saved import Saved, require
from .clusters import Clusters

Entries = list[tuple[int, int]]
OF = "clusters.of"


def check_clusters(saved: Saved, clusters: Clusters) -> None:
    """Raises KvcalError unless the tokens can have these clusters."""
    closed = _check_bookkeeping(saved, clusters)
    ends = [entries[-1][0] if entries else 0 for entries in closed]
    if not any(ends):
        return
    owners = saved.take(OF, torch.int32, *saved.key.shape[:2], max(ends))
    slot = torch.arange(max(ends))
    for sequence, entries in enumerate(closed):
        lowest, highest = torch.full_like(slot, -1), torch.full_like(slot, -1)
        begin, count = clusters.sinks, 0
        for end, total in entries:
            lowest[begin:end], highest[begin:end] = count, total - 1
            begin, count = end, total
        require(
            OF,
            (owners[sequence] >= lowest) & (owners[sequence] <= highest),
            f"clusters of row {sequence} that were made with the token",
        )


def _check_bookkeeping(saved: Saved, clusters: Clusters) -> list[Entries]:
    """The clusterings of each sequence. Raises KvcalError unless its tokens lead to them."""
    prompts, closed = (_entries(saved, f"clusters.{name}") for name in ("prompts", "closed"))
    for sequence, (length, came, stated) in enumerate(zip(saved.lengths, prompts, closed, strict=True)):
        before = -1
        for begin, end in came:
            if not before < begin < end <= length:
                raise KvcalError(
                    f"clusters.prompts: slots {begin} to {end} of row {sequence}, which has {length} tokens"
                )
            before = end
        made = _closings(clusters, came, length, coming=False)
        # What is due may have been clustered already, before a token that has not come; and a segment that ends where a
        # cache was cropped to is clustered again with the next token.
        cropped = made[:-1] if made and made[-1][0] == length else made
        if stated not in (made, cropped, _closings(clusters, came, length, coming=True)):
            raise KvcalError(f"clusters.closed: row {sequence} of {length} tokens is not clustered at such slots")
    return closed


def _entries(saved: Saved, name: str) -> list[Entries]:
    """The entries of each sequence, in their order."""
    entries = saved.take(name, torch.int64, None, 3)
    sequences = entries[:, 0]
    require(name, (sequences >= 0) & (sequences < saved.batch), f"a row of {saved.batch}")
    require(name, sequences[1:] >= sequences[:-1], "rows in order")
    by_sequence: list[Entries] = [[] for _ in range(saved.batch)]
    for sequence, first, second in entries.tolist():
        by_sequence[sequence].append((first, second))
    return by_sequence


def _closings(clusters: Clusters, prompts: Entries, length: int, coming: bool) -> Entries:
    """The clusterings that `Clusters` makes of a sequence of `length` tokens, of which `prompts` came by prefill.

    Args:
        coming: whether what is due before the next token has been built already.
    """
    closings: Entries = []
    upto = count = came = slot = 0
    ends = dict(prompts)

    def close(end: int) -> None:
        nonlocal upto, count
        first = max(upto, clusters.sinks)
        while first < end:
            upto = min(first + clusters.segment, end)
            count += clusters.number(upto - first)
            closings.append((upto, count))
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
    return closings
