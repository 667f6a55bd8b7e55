"""The clusters of a batch's tokens: of its prompts, a segment at a time, then of every full window of decoded tokens.

A clustering is a list of slots: tokens stay where they are, and a list tells them cluster by cluster. Sinks and the
tokens since the last clustering are in no cluster, but open; whoever uses clusters reads those exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..kv.buffers import CHUNK, Places, TokenBuffer, find_places
from ..kv.saved import Saved
from .base import SequenceIndex
from .kmeans import spherical_kmeans, sums_by_label

KEY, VALUE, SIZE, MEMBERS = "cluster.key", "cluster.value", "cluster.size", "cluster.members"
ALIGNED = 16
"""Clusters by whose multiples room is made for steps of fixed shapes."""


class Clusters(SequenceIndex):
    """Cosine clusters per (sequence, KV head).

    cluster.key      [B, Hkv, C, D]   mean key
    cluster.value    [B, Hkv, C, Dv]  mean value
    cluster.size     [B, Hkv, C, 1]   int32
    cluster.members  [B, Hkv, S, 1]   int32, from the sinks on the positions of the tokens of the first cluster, of the
                                      second, …, each in ascending order
    """

    def __init__(
        self,
        tokens_per_cluster: int,
        sinks: int,
        segment: int,
        window_of: Callable[[int], int],
        *,
        start: Tensor | None = None,
        iterations: int = 20,
    ):
        """
        Args:
            segment: tokens that are clustered together at most, so that the cost grows linearly with the prompt.
            window_of: how many decoded tokens a sequence of so many tokens leaves open at most.
            start: [Hkv, C0, D] calibrated centroids.
        """
        self.tokens_per_cluster, self.sinks = tokens_per_cluster, sinks
        self.segment, self.window_of = segment, window_of
        self.start, self.iterations = start, iterations
        self.buffers: dict[str, TokenBuffer] = {}
        self.most_passes = 0
        """Over its tokens, of the clustering that took most of them to converge."""
        self._closed: list[list[tuple[int, int]]] = []
        """Of each sequence, after each of its clusterings: (tokens before the open ones, clusters)."""
        self._prompts: list[list[tuple[int, int]]] = []
        """Of each sequence: slots (begin, end) that came by prefill."""
        self._on_device: tuple[Tensor, Tensor] | None = None
        """[B] int32 each: `upto` and `counts`, where steps read them."""

    @property
    def upto(self) -> list[int]:
        """Tokens of each sequence before its open window: sinks, then clustered ones."""
        return [closed[-1][0] if closed else 0 for closed in self._closed]

    @property
    def counts(self) -> list[int]:
        """Clusters of each sequence."""
        return [closed[-1][1] if closed else 0 for closed in self._closed]

    def on_device(self) -> tuple[Tensor, Tensor]:
        """`upto` and `counts`, [B] int32 each: the same two tensors for as long as the batch is the same."""
        assert self._on_device is not None
        return self._on_device

    # When

    def prefilled(self, before: Sequence[int], after: Sequence[int], buffers: Mapping[str, TokenBuffer]) -> None:
        """Clusters whole segments at once; what is left of the prompt before the next token, whatever its number."""
        self._open_books(len(after))
        for prompts, begin, end in zip(self._prompts, before, after, strict=True):
            if prompts and prompts[-1][1] == begin:
                begin, _ = prompts.pop()
            if end > begin:
                prompts.append((begin, end))
        first = [max(upto, min(self.sinks, end)) for upto, end in zip(self.upto, after, strict=True)]
        whole = [(end - begin) // self.segment * self.segment for begin, end in zip(first, after, strict=True)]
        self._cluster([range(begin, begin + part) for begin, part in zip(first, whole, strict=True)], buffers)

    def due(self, lengths: Sequence[int]) -> bool:
        return any(self._due(lengths, [True] * len(lengths)))

    def build(self, lengths: Sequence[int], coming: Sequence[bool], buffers: Mapping[str, TokenBuffer]) -> None:
        self._cluster(self._due(lengths, coming), buffers)

    def _due(self, lengths: Sequence[int], coming: Sequence[bool]) -> list[range]:
        """The slots of each sequence that have to be clustered before its next token comes."""
        self._open_books(len(lengths))
        slots = []
        for row, (upto, length) in enumerate(zip(self.upto, lengths, strict=True)):
            first = max(upto, min(self.sinks, length))
            prompts = self._prompts[row]
            due = length - first >= self.window_of(length) or bool(prompts and prompts[-1][1] > first)
            slots.append(range(first, length if due and coming[row] else first))
        return slots

    def _open_books(self, sequences: int) -> None:
        self._closed = self._closed or [[] for _ in range(sequences)]
        self._prompts = self._prompts or [[] for _ in range(sequences)]

    # How

    def _cluster(self, slots: list[range], buffers: Mapping[str, TokenBuffer]) -> None:
        """Cluster these slots of each sequence, a segment at a time."""
        if not any(slots):
            return
        while any(slots):
            self._cluster_segment([part[: self.segment] for part in slots], buffers)
            slots = [part[self.segment :] for part in slots]
        self._tell_device()

    def _cluster_segment(self, slots: Sequence[range], buffers: Mapping[str, TokenBuffer]) -> None:
        device = self._device(buffers)
        before, lengths = self.counts, [len(part) for part in slots]
        index, held = slot_index(slots, device)
        keys, values = (take(buffers[name].view, slots, index) for name in ("key", "value"))
        counts = [self.number(length) for length in lengths]
        found = spherical_kmeans(keys, lengths, counts, start=self.start, iterations=self.iterations)
        self.most_passes = max(self.most_passes, *found.iterations)
        self._keep_means(keys, values, found.labels, held, counts)
        self._keep_members(slots, found.labels.masked_fill(~held, max(counts)))
        for closed, part, first, count in zip(self._closed, slots, before, counts, strict=True):
            if part:
                closed.append((part.stop, first + count))

    def number(self, tokens: int) -> int:
        """Clusters that so many tokens make, a segment at most."""
        return min(tokens, max(1, round(tokens / self.tokens_per_cluster))) if tokens else 0

    def _keep_means(self, keys: Tensor, values: Tensor, labels: Tensor, held: Tensor, counts: Sequence[int]) -> None:
        """
        Args:
            labels: [B, Hkv, L], from 0 on in each sequence.
            counts: new clusters of each.
        """
        most = max(counts)
        sizes = sums_by_label(torch.ones_like(keys[..., :1]), labels, held, most)
        kept = torch.arange(most) < torch.tensor(counts).unsqueeze(1)
        places = find_places(self.counts, most, kept, keys.device)
        for name, tensor in ((KEY, keys), (VALUE, values)):
            means = sums_by_label(tensor, labels, held, most) / sizes.clamp_min(1)
            self._buffer(name).write(means.to(tensor.dtype), places)
        self._buffer(SIZE).write(sizes.to(torch.int32), places)

    def _keep_members(self, slots: Sequence[range], labels: Tensor) -> None:
        """
        Args:
            labels: [B, Hkv, L], the largest beyond the slots of a sequence.
        """
        index, held = slot_index(slots, labels.device)
        members = index + labels.argsort(dim=-1, stable=True) - torch.arange(labels.shape[-1], device=labels.device)
        row, _, token = held.nonzero(as_tuple=True)
        places = Places([part.stop for part in slots], (row, token, index[row, 0, token]))
        self._buffer(MEMBERS).write(members.unsqueeze(-1).to(torch.int32), places)

    def _buffer(self, name: str) -> TokenBuffer:
        """Clusters are fewer than tokens, and their buffers grow accordingly."""
        chunk = CHUNK if name == MEMBERS else -(-CHUNK // self.tokens_per_cluster)
        return self.buffers.setdefault(name, TokenBuffer(chunk))

    def _device(self, buffers: Mapping[str, TokenBuffer]) -> torch.device:
        assert self._on_device is not None
        return self._on_device[0].device

    def _tell_device(self) -> None:
        if self._on_device is not None and self._closed:
            for tensor, of in zip(self._on_device, (self.upto, self.counts), strict=True):
                tensor.copy_(torch.tensor(of, dtype=torch.int32))

    # With the batch

    def begin(self, sequences: int, device: torch.device) -> None:
        if self._on_device is None or len(self._on_device[0]) != sequences or self._on_device[0].device != device:
            none = torch.zeros(sequences, dtype=torch.int32, device=device)
            self._on_device = none, none.clone()
            self._tell_device()

    def crop(self, lengths: Sequence[int]) -> None:
        for closed, prompts, length in zip(self._closed, self._prompts, lengths, strict=True):
            while closed and closed[-1][0] >= length:
                closed.pop()
            while prompts and prompts[-1][1] > length:
                begin, _ = prompts.pop()
                if begin < length:
                    prompts.append((begin, length))
        self._shorten()

    def reorder(self, index: Tensor) -> None:
        if self._closed:
            self._closed = [list(self._closed[row]) for row in index.tolist()]
            self._prompts = [list(self._prompts[row]) for row in index.tolist()]
        for buffer in self.buffers.values():
            buffer.keep(index)
        if self._on_device is not None:
            upto, counts = (tensor.index_select(0, index.to(tensor.device)) for tensor in self._on_device)
            self._on_device = upto, counts
        self._shorten()

    def _shorten(self) -> None:
        """Buffers hold no more than the sequence of most clusters has."""
        clusters, tokens = max(self.counts, default=0), max(self.upto, default=0)
        for name in list(self.buffers):
            self.buffers[name].used = min(tokens if name == MEMBERS else clusters, self.buffers[name].used)
            if not clusters:
                del self.buffers[name]
        self._tell_device()

    def to(self, device: torch.device | str) -> None:
        for buffer in self.buffers.values():
            if buffer.tensor is not None:
                buffer.tensor = buffer.tensor.to(device, non_blocking=True)
        if self._on_device is not None:
            self._on_device = self._on_device[0].to(device), self._on_device[1].to(device)

    def reserve(self, tokens: int, lengths: Sequence[int]) -> None:
        if not self.buffers:
            return
        # Windows that close make no more clusters than this, as long as they do not shrink.
        shortest = min(lengths)
        window = self.window_of(shortest)
        more = (-(-(tokens - shortest) // window) + 1) * self.number(min(window, self.segment))
        clusters = -(-(max(self.counts) + more) // ALIGNED) * ALIGNED
        for name, buffer in self.buffers.items():
            buffer.reserve(tokens if name == MEMBERS else clusters, buffer.view)

    def tensors(self) -> Mapping[str, Tensor]:
        return {name: buffer.tensor for name, buffer in self.buffers.items() if buffer.tensor is not None}

    def entries(self) -> int:
        return sum(self.counts)

    # Saved

    def state(self) -> dict[str, Tensor]:
        """`clusters.closed`, `clusters.prompts`: entries [N, 3] of a sequence and its two numbers; and the cluster of
        every token, `clusters.of` [B, Hkv, S] int32, -1 of tokens in none."""
        books = {
            f"clusters.{name}": torch.tensor(
                [[row, *entry] for row, entries in enumerate(of_rows) for entry in entries], dtype=torch.int64
            ).view(-1, 3)
            for name, of_rows in (("closed", self._closed), ("prompts", self._prompts))
        }
        return books | ({"clusters.of": self._owners()} if any(self.counts) else {})

    def _owners(self) -> Tensor:
        members, sizes = (self.buffers[name].view.squeeze(-1).long().cpu() for name in (MEMBERS, SIZE))
        owners = torch.full(members.shape, -1, dtype=torch.int32)
        for row, (upto, count) in enumerate(zip(self.upto, self.counts, strict=True)):
            for head in range(members.shape[1]):
                of = torch.arange(count, dtype=torch.int32).repeat_interleave(sizes[row, head, :count])
                owners[row, head, members[row, head, upto - len(of) : upto]] = of
        return owners

    def restore(self, state: Mapping[str, Tensor], buffers: Mapping[str, TokenBuffer]) -> None:
        sequences = len(state["lengths"])
        self._closed, self._prompts = [[] for _ in range(sequences)], [[] for _ in range(sequences)]
        for row, begin, end in state["clusters.prompts"].tolist():
            self._prompts[row].append((begin, end))
        closings: list[list[tuple[int, int]]] = [[] for _ in range(sequences)]
        for row, upto, count in state["clusters.closed"].tolist():
            closings[row].append((upto, count))
        if "clusters.of" in state:
            self._restore_clusters(
                [closed[-1] if closed else (0, 0) for closed in closings], state["clusters.of"], buffers
            )
        self._closed = closings
        self._tell_device()

    def _restore_clusters(
        self, last: Sequence[tuple[int, int]], clusters: Tensor, buffers: Mapping[str, TokenBuffer]
    ) -> None:
        """All at once: clusters that were made later have higher numbers.

        Args:
            last: of each sequence, its last clustering.
            clusters: of every token, as of `state`.
        """
        slots = [range(min(self.sinks, upto), upto) for upto, _ in last]
        index, held = slot_index(slots, self._device(buffers))
        keys, values = (take(buffers[name].view, slots, index) for name in ("key", "value"))
        labels = take(clusters.unsqueeze(-1), slots, index).squeeze(-1).to(index.device)
        counts = [count for _, count in last]
        self._keep_means(keys, values, labels.masked_fill(~held, 0), held, counts)
        self._keep_members(slots, labels.masked_fill(~held, max(counts)))

    def check(self, saved: Saved) -> None:
        from .saved_clusters import check_clusters

        check_clusters(saved, self)


def slot_index(slots: Sequence[range], device: torch.device) -> tuple[Tensor, Tensor]:
    """([B, 1, L] int64 the slots, slot 0 beyond a sequence's own, [B, 1, L] bool which count)."""
    longest = max(map(len, slots))
    begin = torch.tensor([part.start for part in slots], device=device).view(-1, 1, 1)
    length = torch.tensor([len(part) for part in slots], device=device).view(-1, 1, 1)
    offset = torch.arange(longest, device=device)
    held = offset < length
    return torch.where(held, begin + offset, 0), held


def take(tokens: Tensor, slots: Sequence[range], index: Tensor) -> Tensor:
    """[B, H, S, D] at the slots of each sequence -> [B, H, L, D], on the index's device wherever these lie.

    Args:
        index: [B, 1, L], as of `slot_index`.
    """
    if len(set(slots)) == 1:
        return tokens[:, :, slots[0].start : slots[0].stop].to(index.device)
    wanted = index.to(tokens.device).expand(-1, tokens.shape[1], -1)
    return tokens.gather(2, wanted.unsqueeze(-1).expand(-1, -1, -1, tokens.shape[3])).to(index.device)
