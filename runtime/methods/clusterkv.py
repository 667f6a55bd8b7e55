"""ClusterKV (Liu et al., 2024): select whole clusters of semantically similar tokens.

The keys of a prompt are clustered by their directions, and later those of every full window of decoded tokens. A step
reads the first tokens, those that are in no cluster yet, and whole clusters in descending order of q·centroid until the
budget is full, of the last one its first tokens.

With `tail` (ours) unselected tokens contribute through their clusters: a cluster of n tokens, m of them selected,
stands for n − m tokens at its mean key, with its mean value:

    out = (Σ_read e^{q·k} v + Σ_c (n_c − m_c) e^{q·k̄_c} v̄_c) / (Σ_read e^{q·k} + Σ_c (n_c − m_c) e^{q·k̄_c})

The mean key is that of all n tokens, selected ones included. That makes q·k̄ too large for the unselected ones, while
e^{q·k̄} is below the mean of e^{q·k} (Jensen): the two errors partly cancel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...artifacts import Artifact
from ..attention import SoftmaxSpec
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
    """A window is clustered early when it takes half of what is read."""
    keep: Amount = 1024
    """Tokens read per step, the sinks and the open window included: a count, or a fraction of the sequence's tokens."""
    tail: bool = False
    """Whether unselected tokens contribute through their clusters."""
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

    @classmethod
    def planning_grid(cls, head_dim: int, keeps: Sequence[float]) -> list[dict[str, Any]]:
        sizes = (16, 32, 80)
        return [
            {"keep": keep, "tokens_per_cluster": size, "sinks": 4, "window": 64} for keep in keeps for size in sizes
        ]

    def not_captured(self) -> str | None:
        return None if self.offload == "none" else "an offloaded cache copies what the step selects"

    def not_paged(self) -> str | None:
        return "its clusters are built over a whole sequence, and belong to no page"

    def bind(self, layer: int, head_dim: int, artifact: Artifact | None) -> ClusterKVPolicy:
        self.check()
        calibrated = artifact is not None and "clusters" in artifact.stages
        return ClusterKVPolicy(self, artifact.tensor("clusters", layer, "centroids") if calibrated else None)  # type: ignore[union-attr]


@dataclass(frozen=True)
class Open:
    """The open tokens of each sequence, and how many others a step reads. Open tokens are in no cluster and always
    read: the sinks, and the window of tokens since the last clustering. Each tensor is [B, 1, 1, 1] int64."""

    sinks: Tensor
    """How many sinks there are; clustered tokens begin at this position."""
    window: Tensor
    """The position where clustered tokens end and the window begins."""
    number: Tensor
    """How many open tokens there are."""
    room: Tensor
    """How many clustered tokens may be read."""
    most: int
    """The most tokens that are read of any sequence."""


class ClusterKVPolicy(Policy):
    def __init__(self, settings: ClusterKV, start: Tensor | None):
        """
        Args:
            start: [Hkv, C, D] centroids that clusterings begin with.
        """
        self.settings, self.start = settings, start
        if settings.offload == "cpu":
            self.offloaded, self.cached = ("key", "value"), settings.cached

    def sequence_index(self) -> Clusters:
        settings = self.settings
        return Clusters(
            settings.tokens_per_cluster,
            settings.sinks,
            settings.segment,
            settings.window_of,
            start=self.start,
            iterations=settings.iterations,
        )

    def step(self, query: Tensor, cache: LayerCache, spec: SoftmaxSpec) -> Attended:
        settings, metadata, clusters = self.settings, cache.metadata, cache.sequence_index
        assert isinstance(clusters, Clusters)
        if settings.of(metadata.longest) == metadata.longest or not clusters.buffers:
            return Attended(attend_all(self, query, cache, spec), None)
        tensors, (_, counts) = clusters.tensors(), clusters.on_device()
        grouped = query.squeeze(2).unflatten(1, (tensors[KEY].shape[1], -1))
        scores = spec.logits(grouped.float() @ tensors[KEY].float().mT)
        cluster_mask = (torch.arange(scores.shape[-1], device=scores.device) < counts.view(-1, 1))[:, None, None]
        scores = scores.masked_fill(~cluster_mask, -torch.inf)
        size = tensors[SIZE].squeeze(-1).long().unsqueeze(2) * cluster_mask
        selected, unselected = self._select(shared(scores, settings.select), size, clusters, metadata)
        if not settings.tail:
            return Attended(attend_selected(query, cache, selected, spec), selected)
        out = self._with_tail(grouped.float(), cache, selected, scores + unselected.log(), tensors[VALUE], spec)
        return Attended(out.flatten(1, 2).unsqueeze(2).to(query.dtype), selected)

    def _select(
        self, scores: Tensor, size: Tensor, clusters: Clusters, metadata: DecodeMetadata
    ) -> tuple[Selected, Tensor]:
        """Select all open tokens, then clusters in descending order of score until the room is full; of the last one
        only as many tokens, the first ones, as fit.

        Args:
            scores: [B, Hkv, G or 1, C].
            size: [B, Hkv, 1, C] int64, 0 where a sequence has no such cluster.

        Returns:
            The selected tokens, and how many tokens of each cluster are unselected, [B, Hkv, G or 1, C] float32.
        """
        open_tokens = metadata.once((self.settings, *clusters.upto), lambda: self._open(clusters, metadata))
        start = (size.cumsum(-1) - size + open_tokens.sinks).expand_as(scores)
        order = scores.argsort(dim=-1, descending=True, stable=True)
        ordered = size.expand_as(scores).gather(-1, order)
        filled = ordered.cumsum(-1)
        taken = open_tokens.room.minimum(filled[..., -1:])
        turn = torch.arange(open_tokens.most, device=scores.device)
        rank = (turn - open_tokens.number).clamp_min(0).expand(*scores.shape[:3], -1).contiguous()
        cluster = torch.searchsorted(filled, rank, right=True).clamp_max(scores.shape[-1] - 1)
        within = rank - (filled - ordered).gather(-1, cluster)
        slot = start.gather(-1, order.gather(-1, cluster)) + within
        members = clusters.tensors()[MEMBERS].squeeze(-1).unsqueeze(2).expand(*scores.shape[:3], -1)
        position = members.gather(-1, slot.clamp_max(members.shape[-1] - 1)).long()
        always = torch.where(turn < open_tokens.sinks, turn, open_tokens.window + turn - open_tokens.sinks)
        valid = turn < open_tokens.number + taken
        index = torch.where(turn < open_tokens.number, always, position).masked_fill(~valid, 0)
        ordered_unselected = ordered - (taken - (filled - ordered)).clamp_min(0).minimum(ordered)
        unselected = torch.zeros_like(scores).scatter(-1, order, ordered_unselected.to(scores.dtype))
        return Selected(index, valid), unselected

    def _open(self, clusters: Clusters, metadata: DecodeMetadata) -> Open:
        settings, lengths = self.settings, metadata.seq_lens.long()
        sinks = lengths.clamp_max(settings.sinks)
        window = clusters.on_device()[0].long().maximum(sinks)
        number = sinks + lengths - window
        wanted = budgets(settings, metadata.seq_lens).long()
        # A sequence that is read whole gets room for all of its clusters.
        room = torch.where(wanted == lengths, lengths, (wanted - number).clamp_min(0))
        most = min(metadata.longest, max(settings.most(metadata.longest), settings.sinks + settings.window + 1))
        if metadata.lengths is not None:
            ends = zip(metadata.lengths, clusters.upto, strict=True)
            most = max(
                max(settings.of(length), length - max(0, upto - min(settings.sinks, length))) for length, upto in ends
            )
        sinks, window, number, room = (tensor.view(-1, 1, 1, 1) for tensor in (sinks, window, number, room))
        return Open(sinks, window, number, room, most)

    def _with_tail(
        self, grouped: Tensor, cache: LayerCache, selected: Selected, tail: Tensor, means: Tensor, spec: SoftmaxSpec
    ) -> Tensor:
        """[B, Hkv, G, Dv] float32: attention to the selected tokens and to the clusters that stand for unselected ones.

        Args:
            tail: [B, Hkv, G, C], logits of the clusters' mean keys, plus the logarithm of how many tokens each stands
                for.
            means: [B, Hkv, C, Dv], the clusters' mean values.
        """
        index = selected.index
        gathered = cache.gather(("key", "value"), index.flatten(2), selected.valid.flatten(2))
        key, value = (tensor.unflatten(2, index.shape[2:]).float() for tensor in gathered)
        exact = spec.logits((grouped.unsqueeze(3) @ key.mT).squeeze(3)).masked_fill(~selected.valid, -torch.inf)
        weights = spec.softmax(torch.cat((exact, tail), -1)).unsqueeze(3)
        count = index.shape[-1]
        out = weights[..., :count] @ value + weights[..., count:] @ means.float().unsqueeze(2)
        return out.squeeze(3)

    def selection_bytes(self, reading: Reading) -> int:
        """Of every cluster the mean key and size, with a tail the mean value, too; of selected tokens the position."""
        assert isinstance(reading.selected, Selected)
        names = (KEY, SIZE, VALUE) if self.settings.tail else (KEY, SIZE)
        clusters = reading.entries * reading.heads * sum(reading.widths[name] for name in names)
        return clusters + int(self.tokens_read(reading.selected)) * reading.widths[MEMBERS]
