"""ClusterKV (Liu et al., 2024): recall whole clusters of semantically similar tokens.

The keys of a prompt are clustered by their directions, and later those of every full window of decoded tokens. A step
reads the first tokens, those that are in no cluster yet, and whole clusters in descending order of q·centroid until the
budget is full, of the last one its first tokens.

With `tail` (ours) what is not read contributes through its cluster: n tokens of which m were read stand as n − m tokens
at the cluster's mean key, with its mean value:

    out = (Σ_read e^{q·k} v + Σ_c (n_c − m_c) e^{q·k̄_c} v̄_c) / (Σ_read e^{q·k} + Σ_c (n_c − m_c) e^{q·k̄_c})

The mean key keeps the tokens that were read. That makes it too large for what is left, and e^{q·k̄} is below the mean of
e^{q·k} (Jensen): the two errors partly cancel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...artifacts import Artifact
from ..attention import Logits
from ..kv.pages import DecodeMetadata, LayerCache
from .amounts import Amount, check_choice, check_count, check_flag
from .base import Attended, Method, Policy, Reading, Selected
from .budgets import budgets
from .choosing import Selection, attend_selected, shared
from .clusters import KEY, MEMBERS, SIZE, VALUE, Clusters
from .full import attend_all


@dataclass(frozen=True)
class ClusterKV(Selection, Method):
    keep_shapes_cache = True
    """Windows close when they take half of what is read."""
    keep: Amount = 1024
    """Tokens read per step, the sinks and the open window included: a count, or a fraction of the sequence's tokens."""
    tail: bool = False
    """Whether what is not read contributes through its cluster."""
    tokens_per_cluster: int = 16
    window: int = 320
    """Decoded tokens that are clustered together once there are so many, or once they and the sinks take half of what
    is read; until then they are read exactly."""
    sinks: int = 16
    """First tokens, in no cluster and always read."""
    segment: int = 8192
    """Tokens of a prompt that are clustered together at most."""
    iterations: int = 20
    """Passes of k-means at most; with clusters of 16 tokens 3 leave no larger error of attention (docs/methods.md)."""
    offload: str = "none"
    """"cpu": keys and values lie in host memory, and only what is read and not cached on the device is copied."""
    cached: int = 2048
    """With `offload`: tokens per KV head that are cached on the device."""

    def check(self) -> None:
        super().check()
        check_flag("tail", self.tail)
        for name in ("tokens_per_cluster", "window", "segment", "iterations", "cached"):
            check_count(name, getattr(self, name), 1)
        check_count("sinks", self.sinks)
        check_choice("offload", self.offload, ("none", "cpu"))

    def window_of(self, length: int) -> int:
        """Decoded tokens after which a sequence of so many tokens is clustered again."""
        return max(1, min(self.window, self.of(length) // 2 - self.sinks))

    def not_captured(self) -> str | None:
        return None if self.offload == "none" else "an offloaded cache copies what the step selects"

    def bind(self, layer: int, head_dim: int, artifact: Artifact | None) -> ClusterKVPolicy:
        self.check()
        calibrated = artifact is not None and "clusters" in artifact.stages
        return ClusterKVPolicy(self, artifact.tensor("clusters", layer, "centroids") if calibrated else None)  # type: ignore[union-attr]


@dataclass(frozen=True)
class Open:
    """The tokens that are in no cluster, and how many others are read. Each tensor is [B, 1, 1, 1] int64."""

    sinks: Tensor
    """How many, and where the clustered tokens begin."""
    window: Tensor
    """Where they end and the window begins."""
    number: Tensor
    """Of open tokens."""
    room: Tensor
    """Tokens that clusters may take."""
    most: int
    """No more tokens are read of any sequence."""


class ClusterKVPolicy(Policy):
    def __init__(self, settings: ClusterKV, start: Tensor | None):
        """
        Args:
            start: [Hkv, C, D] centroids that clusterings begin with.
        """
        self.settings, self.start = settings, start
        if settings.offload == "cpu":
            self.offloaded, self.cached = ("key", "value"), settings.cached

    def index(self) -> Clusters:
        of = self.settings
        return Clusters(
            of.tokens_per_cluster, of.sinks, of.segment, of.window_of, start=self.start, iterations=of.iterations
        )

    def step(self, query: Tensor, cache: LayerCache, logits: Logits) -> Attended:
        settings, metadata, clusters = self.settings, cache.metadata, cache.index
        assert isinstance(clusters, Clusters)
        if settings.of(metadata.longest) == metadata.longest or not clusters.buffers:
            return Attended(attend_all(query, *self.keys_values(cache), metadata, logits), None)
        tensors, (_, counts) = clusters.tensors(), clusters.on_device()
        grouped = query.squeeze(2).unflatten(1, (tensors[KEY].shape[1], -1))
        scores = logits.of(grouped.float() @ tensors[KEY].float().mT)
        there = (torch.arange(scores.shape[-1], device=scores.device) < counts.view(-1, 1))[:, None, None]
        scores = scores.masked_fill(~there, -torch.inf)
        size = tensors[SIZE].squeeze(-1).long().unsqueeze(2) * there
        selected, left = self._recall(shared(scores, settings.select), size, clusters, metadata)
        if not settings.tail:
            return Attended(attend_selected(query, cache, selected, logits), selected)
        out = self._with_tail(grouped.float(), cache, selected, scores + left.log(), tensors[VALUE], logits)
        return Attended(out.flatten(1, 2).unsqueeze(2).to(query.dtype), selected)

    def _recall(
        self, scores: Tensor, size: Tensor, clusters: Clusters, metadata: DecodeMetadata
    ) -> tuple[Selected, Tensor]:
        """Open tokens, then clusters in descending order of score until the room is full, of the last its first tokens.

        Args:
            scores: [B, Hkv, G or 1, C]. size: [B, Hkv, 1, C] int64, 0 where a sequence has no such cluster.

        Returns:
            The tokens that are read, and of each cluster [B, Hkv, G or 1, C] float32 how many are not.
        """
        opened = metadata.once((self.settings, *clusters.upto), lambda: self._open(clusters, metadata))
        start = (size.cumsum(-1) - size + opened.sinks).expand_as(scores)
        order = scores.argsort(dim=-1, descending=True, stable=True)
        ordered = size.expand_as(scores).gather(-1, order)
        filled = ordered.cumsum(-1)
        taken = opened.room.minimum(filled[..., -1:])
        turn = torch.arange(opened.most, device=scores.device)
        rank = (turn - opened.number).clamp_min(0).expand(*scores.shape[:3], -1).contiguous()
        cluster = torch.searchsorted(filled, rank, right=True).clamp_max(scores.shape[-1] - 1)
        within = rank - (filled - ordered).gather(-1, cluster)
        slot = start.gather(-1, order.gather(-1, cluster)) + within
        members = clusters.tensors()[MEMBERS].squeeze(-1).unsqueeze(2).expand(*scores.shape[:3], -1)
        position = members.gather(-1, slot.clamp_max(members.shape[-1] - 1)).long()
        always = torch.where(turn < opened.sinks, turn, opened.window + turn - opened.sinks)
        valid = turn < opened.number + taken
        index = torch.where(turn < opened.number, always, position).masked_fill(~valid, 0)
        unread = ordered - (taken - (filled - ordered)).clamp_min(0).minimum(ordered)
        left = torch.zeros_like(scores).scatter(-1, order, unread.to(scores.dtype))
        return Selected(index, valid), left

    def _open(self, clusters: Clusters, metadata: DecodeMetadata) -> Open:
        settings, lengths = self.settings, metadata.seq_lens.long()
        sinks = lengths.clamp_max(settings.sinks)
        window = clusters.on_device()[0].long().maximum(sinks)
        number = sinks + lengths - window
        wanted = budgets(settings, metadata.seq_lens).long()
        # A sequence that is read whole is given room for all of its clusters, which may be more than its tokens.
        room = torch.where(wanted == lengths, lengths, (wanted - number).clamp_min(0))
        most = min(metadata.longest, max(settings.most(metadata.longest), settings.sinks + settings.window + 1))
        if metadata.lengths is not None:
            ends = zip(metadata.lengths, clusters.upto, strict=True)
            most = max(
                max(settings.of(length), length - max(0, upto - min(settings.sinks, length))) for length, upto in ends
            )
        sinks, window, number, room = (of.view(-1, 1, 1, 1) for of in (sinks, window, number, room))
        return Open(sinks, window, number, room, most)

    def _with_tail(
        self, grouped: Tensor, cache: LayerCache, selected: Selected, rest: Tensor, means: Tensor, logits: Logits
    ) -> Tensor:
        """[B, Hkv, G, Dv] float32: softmax over the selected tokens and what stands for the others.

        Args:
            rest: [B, Hkv, G, C], logits of the clusters' mean keys, times the tokens that they stand for.
            means: [B, Hkv, C, Dv], of values.
        """
        index = selected.index
        rows = cache.gather(("key", "value"), index.flatten(2), selected.valid.flatten(2))
        key, value = (of.unflatten(2, index.shape[2:]).float() for of in rows)
        exact = logits.of((grouped.unsqueeze(3) @ key.mT).squeeze(3)).masked_fill(~selected.valid, -torch.inf)
        weights = logits.softmax(torch.cat((exact, rest), -1)).unsqueeze(3)
        count = index.shape[-1]
        out = weights[..., :count] @ value + weights[..., count:] @ means.float().unsqueeze(2)
        return out.squeeze(3)

    def index_bytes(self, reading: Reading) -> int:
        """Of every cluster the mean key and size, with a tail the mean value, too; and where chosen tokens lie."""
        assert reading.selected is not None
        names = (KEY, SIZE, VALUE) if self.settings.tail else (KEY, SIZE)
        clusters = reading.entries * reading.heads * sum(reading.widths[name] for name in names)
        return clusters + int(self.tokens_read(reading.selected)) * reading.widths[MEMBERS]
