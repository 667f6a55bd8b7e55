"""The clusters of a batch's tokens: prompts are clustered a segment at a time, decoded tokens by full windows.

Tokens stay where they are; a clustering is a list of their slots, cluster by cluster. The sinks and the window, that is
the tokens since the last clustering, are open: they are in no cluster, and whoever uses clusters reads them exactly.
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
"""For steps of fixed shapes, room is made for a multiple of so many clusters."""


class Clusters(SequenceIndex):
    """Cosine clusters per (sequence, KV head).

    cluster.key      [B, Hkv, C, D]   mean key
    cluster.value    [B, Hkv, C, Dv]  mean value
    cluster.size     [B, Hkv, C, 1]   int32
    cluster.members  [B, Hkv, S, 1]   int32, from the sinks on, cluster by cluster: the positions of its tokens,
                                      in ascending order
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
            window_of: from the length of a sequence, how many decoded tokens stay open at most.
            start: [Hkv, C0, D] calibrated centroids that clusterings begin with.
        """
        self.tokens_per_cluster, self.sinks = tokens_per_cluster, sinks
        self.segment, self.window_of = segment, window_of
        self.start, self.iterations = start, iterations
        self.buffers: dict[str, TokenBuffer] = {}
        self.most_passes = 0
        """The most passes of k-means that any clustering has taken."""
        self._closed: list[list[tuple[int, int]]] = []
        """Of each sequence, after each of its clusterings: (tokens before the window, clusters so far)."""
        self._prompts: list[list[tuple[int, int]]] = []
        """Of each sequence: slots (begin, end) that came by prefill."""
        self._on_device: tuple[Tensor, Tensor] | None = None
        """[B] int32 each: `upto` and `counts`, where steps read them."""

    @property
    def upto(self) -> list[int]:
        """Tokens of each sequence before its window: sinks, then clustered ones."""
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
        """Cluster whole segments now. What remains of a prompt is due before the next token, however little it is."""
        self._start_bookkeeping(len(after))
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
        self._start_bookkeeping(len(lengths))
        slots = []
        for sequence, (upto, length) in enumerate(zip(self.upto, lengths, strict=True)):
            first = max(upto, min(self.sinks, length))
            prompts = self._prompts[sequence]
            due = length - first >= self.window_of(length) or bool(prompts and prompts[-1][1] > first)
            slots.append(range(first, length if due and coming[sequence] else first))
        return slots

    def _start_bookkeeping(self, sequences: int) -> None:
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
        clustered = spherical_kmeans(keys, lengths, counts, start=self.start, iterations=self.iterations)
        self.most_passes = max(self.most_passes, *clustered.iterations)
        self._keep_means(keys, values, clustered.labels, held, counts)
        self._keep_members(slots, clustered.labels.masked_fill(~held, max(counts)))
        for closed, part, first, count in zip(self._closed, slots, before, counts, strict=True):
            if part:
                closed.append((part.stop, first + count))

    def number(self, tokens: int) -> int:
        """Clusters that so many tokens make, a segment at most."""
        return min(tokens, max(1, round(tokens / self.tokens_per_cluster))) if tokens else 0

    def _keep_means(self, keys: Tensor, values: Tensor, labels: Tensor, held: Tensor, counts: Sequence[int]) -> None:
        """
        Args:
            labels: [B, Hkv, L], the clusters of tokens, numbered from 0 in each sequence.
            counts: how many new clusters each sequence gets.
        """
        width = max(counts)
        sizes = sums_by_label(torch.ones_like(keys[..., :1]), labels, held, width)
        cluster_mask = torch.arange(width) < torch.tensor(counts).unsqueeze(1)
        places = find_places(self.counts, width, cluster_mask, keys.device)
        for name, tensor in ((KEY, keys), (VALUE, values)):
            means = sums_by_label(tensor, labels, held, width) / sizes.clamp_min(1)
            self._buffer(name).write(means.to(tensor.dtype), places)
        self._buffer(SIZE).write(sizes.to(torch.int32), places)

    def _keep_members(self, slots: Sequence[range], labels: Tensor) -> None:
        """
        Args:
            labels: [B, Hkv, L], larger beyond a sequence's slots than within.
        """
        index, held = slot_index(slots, labels.device)
        members = index + labels.argsort(dim=-1, stable=True) - torch.arange(labels.shape[-1], device=labels.device)
        sequence, _, token = held.nonzero(as_tuple=True)
        places = Places([part.stop for part in slots], (sequence, token, index[sequence, 0, token]))
        self._buffer(MEMBERS).write(members.unsqueeze(-1).to(torch.int32), places)

    def _buffer(self, name: str) -> TokenBuffer:
        """The buffer `name`. Clusters are fewer than tokens, so their buffers grow by less at a time."""
        chunk = CHUNK if name == MEMBERS else -(-CHUNK // self.tokens_per_cluster)
        return self.buffers.setdefault(name, TokenBuffer(chunk))

    def _device(self, buffers: Mapping[str, TokenBuffer]) -> torch.device:
        assert self._on_device is not None
        return self._on_device[0].device

    def _tell_device(self) -> None:
        if self._on_device is not None and self._closed:
            for tensor, numbers in zip(self._on_device, (self.upto, self.counts), strict=True):
                tensor.copy_(torch.tensor(numbers, dtype=torch.int32))

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

    def reorder(self, order: Tensor) -> None:
        if self._closed:
            self._closed = [list(self._closed[sequence]) for sequence in order.tolist()]
            self._prompts = [list(self._prompts[sequence]) for sequence in order.tolist()]
        for buffer in self.buffers.values():
            buffer.keep(order)
        if self._on_device is not None:
            upto, counts = (tensor.index_select(0, order.to(tensor.device)) for tensor in self._on_device)
            self._on_device = upto, counts
        self._shorten()

    def _shorten(self) -> None:
        """Cut buffers to what the sequence with the most clusters, or clustered tokens, needs."""
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
        """`clusters.closed`, `clusters.prompts` [N, 3] int64: an entry's sequence, and its two numbers. `clusters.of`
        [B, Hkv, S] int32: the cluster of every token, -1 where it is in none."""
        bookkeeping = {
            f"clusters.{name}": torch.tensor(
                [[sequence, *entry] for sequence, entries in enumerate(of_sequences) for entry in entries],
                dtype=torch.int64,
            ).view(-1, 3)
            for name, of_sequences in (("closed", self._closed), ("prompts", self._prompts))
        }
        return bookkeeping | ({"clusters.of": self._owners()} if any(self.counts) else {})

    def _owners(self) -> Tensor:
        members, sizes = (self.buffers[name].view.squeeze(-1).long().cpu() for name in (MEMBERS, SIZE))
        owners = torch.full(members.shape, -1, dtype=torch.int32)
        for sequence, (upto, count) in enumerate(zip(self.upto, self.counts, strict=True)):
            for head in range(members.shape[1]):
                owner = torch.arange(count, dtype=torch.int32).repeat_interleave(sizes[sequence, head, :count])
                owners[sequence, head, members[sequence, head, upto - len(owner) : upto]] = owner
        return owners

    def restore(self, state: Mapping[str, Tensor], buffers: Mapping[str, TokenBuffer]) -> None:
        sequences = len(state["lengths"])
        self._closed, self._prompts = [[] for _ in range(sequences)], [[] for _ in range(sequences)]
        for sequence, begin, end in state["clusters.prompts"].tolist():
            self._prompts[sequence].append((begin, end))
        closings: list[list[tuple[int, int]]] = [[] for _ in range(sequences)]
        for sequence, upto, count in state["clusters.closed"].tolist():
            closings[sequence].append((upto, count))
        if "clusters.of" in state:
            self._restore_clusters(
                [closed[-1] if closed else (0, 0) for closed in closings], state["clusters.of"], buffers
            )
        self._closed = closings
        self._tell_device()

    def _restore_clusters(
        self, last: Sequence[tuple[int, int]], clusters: Tensor, buffers: Mapping[str, TokenBuffer]
    ) -> None:
        """Make all clusters of the batch at once, which works since clusters that were made later have higher numbers.

        Args:
            last: the last clustering of each sequence.
            clusters: the cluster of every token, as in `state`.
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
    """([B, 1, L] int64 the slots, padded with slot 0, [B, 1, L] bool where there is no padding)."""
    longest = max(map(len, slots))
    begin = torch.tensor([part.start for part in slots], device=device).view(-1, 1, 1)
    length = torch.tensor([len(part) for part in slots], device=device).view(-1, 1, 1)
    offset = torch.arange(longest, device=device)
    held = offset < length
    return torch.where(held, begin + offset, 0), held


def take(tokens: Tensor, slots: Sequence[range], index: Tensor) -> Tensor:
    """[B, H, S, D] at the slots of each sequence -> [B, H, L, D], on the device of `index`.

    Args:
        index: [B, 1, L], as of `slot_index`.
    """
    if len(set(slots)) == 1:
        return tokens[:, :, slots[0].start : slots[0].stop].to(index.device)
    wanted = index.to(tokens.device).expand(-1, tokens.shape[1], -1)
    return tokens.gather(2, wanted.unsqueeze(-1).expand(-1, -1, -1, tokens.shape[3])).to(index.device)
