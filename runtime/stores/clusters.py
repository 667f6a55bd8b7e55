"""The clusters of a store's tokens: built over the whole prompt, then over every full window of decoded tokens.

Sinks and the tokens since the last window are in no cluster; whoever uses clusters reads those exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..kv.buffers import TokenBuffer, find_places
from .kmeans import spherical_kmeans, sums_by_label

SEGMENT = 8192
"""Tokens that are clustered together at most, so that the cost grows linearly with the prompt."""


_KEY, _VALUE, _SIZE = "cluster.key", "cluster.value", "cluster.size"


def is_per_cluster(name: str) -> bool:
    """Whether a store's tensor has one entry per cluster."""
    return name.startswith("cluster.") and name != "cluster.of"


class Clusters:
    """Cosine clusters per (row, KV head), in tensors of the store that owns them.

    cluster.key     [B, Hkv, C, D]   mean key
    cluster.value   [B, Hkv, C, Dv]  mean value
    cluster.size    [B, Hkv, C, 1]   int32
    """

    def __init__(
        self,
        rows: dict[str, TokenBuffer],
        buffer: Callable[[str], TokenBuffer],
        tokens_per_cluster: int,
        sinks: int,
        *,
        start: Tensor | None = None,
        iterations: int = 20,
        segment: int = SEGMENT,
    ):
        """
        Args:
            rows: of the store.
            buffer: makes an empty one by name.
            start: [Hkv, C0, D] calibrated centroids.
        """
        self.tokens_per_cluster, self.sinks = tokens_per_cluster, sinks
        self.start, self.iterations, self.segment = start, iterations, segment
        self._rows, self._buffer = rows, buffer
        self.most_passes = 0
        """Over its tokens, of the clustering that took most of them to converge."""
        self._closed: list[list[tuple[int, int]]] = []
        """Of each row, after each of its clusterings: (tokens before the open window, clusters)."""
        self._prompts: list[list[tuple[int, int]]] = []
        """Of each row: slots (begin, end) that came by prefill."""

    @property
    def keys(self) -> Tensor:
        return self._rows[_KEY].view

    @property
    def values(self) -> Tensor:
        return self._rows[_VALUE].view

    @property
    def sizes(self) -> Tensor:
        """[B, Hkv, C] int32"""
        return self._rows[_SIZE].view.squeeze(-1)

    @property
    def upto(self) -> list[int]:
        """Tokens of each row before the open window: sinks, then clustered ones."""
        return [closed[-1][0] if closed else 0 for closed in self._closed]

    @property
    def counts(self) -> list[int]:
        """Clusters of each row."""
        return [closed[-1][1] if closed else 0 for closed in self._closed]

    def prefilled(self, before: Sequence[int], after: Sequence[int]) -> None:
        """Rows went from `before` to `after` tokens by prefill: the next step clusters them whatever their number."""
        self._open_books(len(after))
        for prompts, begin, end in zip(self._prompts, before, after, strict=True):
            if prompts and prompts[-1][1] == begin:
                begin, _ = prompts.pop()
            if end > begin:
                prompts.append((begin, end))

    def due(self, lengths: Sequence[int], windows: Sequence[int], coming: Sequence[bool]) -> list[range]:
        """The slots of each row that have to be clustered before its next token comes.

        Args:
            windows: how many decoded tokens each row leaves unclustered at most.
            coming: whether a row gets a token now.
        """
        self._open_books(len(lengths))
        slots = []
        for row, (upto, length) in enumerate(zip(self.upto, lengths, strict=True)):
            first = max(upto, min(self.sinks, length))
            prompts = self._prompts[row]
            due = length - first >= windows[row] or bool(prompts and prompts[-1][1] > first)
            slots.append(range(first, length if due and coming[row] else first))
        return slots

    def add(self, slots: Sequence[range], device: torch.device) -> Tensor:
        """Cluster these slots of each row among themselves, a segment at a time.

        Returns:
            [B, Hkv, L] int64: the cluster of each slot, counted from the row's first cluster; -1 beyond a row's slots.
        """
        counts, parts = self.counts, []
        for offset in range(0, max(map(len, slots)), self.segment):
            of_segment = [part[offset : offset + self.segment] for part in slots]
            counts, labels = self._add_segment(of_segment, counts, device)
            parts.append(labels)
        for closed, part, count in zip(self._closed, slots, counts, strict=True):
            if part:
                closed.append((part.stop, count))
        return torch.cat(parts, 2)

    def _add_segment(self, slots: Sequence[range], before: list[int], device: torch.device) -> tuple[list[int], Tensor]:
        """(clusters of each row, which had `before`, labels as of `add`)"""
        lengths = [len(part) for part in slots]
        index, held = slot_index(slots, device)
        keys, values = (take(self._rows[name].view, index) for name in ("key", "value"))
        counts = [self._number(length) for length in lengths]
        found = spherical_kmeans(keys, lengths, counts, start=self.start, iterations=self.iterations)
        self.most_passes = max(self.most_passes, *found.iterations)
        most = max(counts)
        sizes = sums_by_label(torch.ones_like(keys[..., :1]), found.labels, held, most)
        kept = torch.arange(most) < torch.tensor(counts).unsqueeze(1)
        places = find_places(before, most, kept, device)
        for name, tensor in ((_KEY, keys), (_VALUE, values)):
            means = sums_by_label(tensor, found.labels, held, most) / sizes.clamp_min(1)
            self._rows.setdefault(name, self._buffer(name)).write(means.to(tensor.dtype), places)
        self._rows.setdefault(_SIZE, self._buffer(_SIZE)).write(sizes.to(torch.int32), places)
        labels = found.labels + torch.tensor(before, device=device).view(-1, 1, 1)
        return places.after, labels.masked_fill(~held, -1)

    def number(self, tokens: int) -> int:
        """Of clusters that so many tokens make, a segment at a time."""
        segments, rest = divmod(tokens, self.segment)
        return segments * self._number(self.segment) + self._number(rest)

    def _number(self, tokens: int) -> int:
        return min(tokens, max(1, round(tokens / self.tokens_per_cluster))) if tokens else 0

    def undo(self, lengths: Sequence[int]) -> list[tuple[int, int]]:
        """Take back what was clustered once a row had more than `lengths` tokens, which it has no longer.

        Returns:
            Per row the slots (begin, end) that are in no cluster any more.
        """
        end = self.upto
        for closed, prompts, length in zip(self._closed, self._prompts, lengths, strict=True):
            while closed and closed[-1][0] >= length:
                closed.pop()
            while prompts and prompts[-1][1] > length:
                begin, _ = prompts.pop()
                if begin < length:
                    prompts.append((begin, length))
        self.shorten()
        return list(zip(self.upto, end, strict=True))

    def select(self, rows: Sequence[int]) -> None:
        if self._closed:
            self._closed = [list(self._closed[row]) for row in rows]
            self._prompts = [list(self._prompts[row]) for row in rows]

    def _open_books(self, rows: int) -> None:
        self._closed = self._closed or [[] for _ in range(rows)]
        self._prompts = self._prompts or [[] for _ in range(rows)]

    def shorten(self) -> None:
        """Buffers hold no more than the row of most clusters has."""
        used = max(self.counts, default=0)
        for name in filter(is_per_cluster, list(self._rows)):
            self._rows[name].used = min(used, self._rows[name].used)
            if not used:
                del self._rows[name]

    def state(self) -> dict[str, Tensor]:
        """Entries [N, 3] of a row, and its two numbers."""
        return {
            f"clusters.{name}": torch.tensor(
                [[row, *entry] for row, entries in enumerate(of_rows) for entry in entries], dtype=torch.int64
            ).view(-1, 3)
            for name, of_rows in (("closed", self._closed), ("prompts", self._prompts))
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        self._closed = [[] for _ in state["lengths"]]
        self._prompts = [[] for _ in state["lengths"]]
        for name, of_rows in (("closed", self._closed), ("prompts", self._prompts)):
            for row, first, second in state[f"clusters.{name}"].tolist():
                of_rows[row].append((first, second))

    def there(self, device: torch.device) -> Tensor:
        """[B, 1, C] bool: False at what a row has no cluster for."""
        counts = torch.tensor(self.counts, device=device).view(-1, 1, 1)
        return torch.arange(int(max(self.counts)), device=device) < counts

    def leave_out(self, slot: Tensor) -> Tensor:
        """Whether slots [B, …] are in no cluster."""
        upto = torch.tensor(self.upto, device=slot.device).view(-1, *[1] * (slot.dim() - 1))
        return (slot < self.sinks) | (slot >= upto)

    def open_slots(self, lengths: Sequence[int]) -> list[list[int]]:
        """Of each row: the slots that are in no cluster."""
        return [
            [*range(min(self.sinks, length)), *range(max(done, min(self.sinks, length)), length)]
            for done, length in zip(self.upto, lengths, strict=True)
        ]


def slot_index(slots: Sequence[range], device: torch.device) -> tuple[Tensor, Tensor]:
    """([B, 1, L] int64 the slots, slot 0 beyond a row's own, [B, 1, L] bool which count)."""
    longest = max(map(len, slots))
    begin = torch.tensor([part.start for part in slots], device=device).view(-1, 1, 1)
    length = torch.tensor([len(part) for part in slots], device=device).view(-1, 1, 1)
    offset = torch.arange(longest, device=device)
    held = offset < length
    return torch.where(held, begin + offset, 0), held


def take(rows: Tensor, index: Tensor) -> Tensor:
    """[B, H, S, D] at [B, 1 or H, L] -> [B, H, L, D], on the index's device wherever the rows lie."""
    wanted = index.to(rows.device).expand(-1, rows.shape[1], -1)
    return rows.gather(2, wanted.unsqueeze(-1).expand(-1, -1, -1, rows.shape[3])).to(index.device)
