"""SparQ (Ribar et al., 2024, algorithm 1): scores from the query's largest channels; the mean value stands for
unselected tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...artifacts import Artifact
from ..attention import SoftmaxSpec
from ..kv.pages import LayerCache
from .amounts import Amount, check_amount, check_choice, count_of
from .base import Attended, Method, Policy, Reading, Selected
from .choosing import Counts, Selection, attend_selected, choose
from .full import attend_all

RECENT = 0.25
"""The share of the budget for the last tokens, always read."""


@dataclass(frozen=True)
class Sparq(Selection, Method):
    rank: Amount = 0.25
    """Channels of the query, of largest magnitude, that are scored."""

    def bind(self, layer: int, head_dim: int, artifact: Artifact | None) -> SparqPolicy:
        self.check()
        check_choice("select", self.select, ("head", "group"))
        check_amount("rank", self.rank, head_dim, "the head dim")
        return SparqPolicy(self, count_of(self.rank, head_dim), head_dim)


class SparqPolicy(Policy):
    def __init__(self, settings: Sparq, channels: int, dims: int):
        """
        Args:
            channels: r, those of the D = `dims` channels of a query that are scored.
        """
        self.settings, self.channels, self.dims = settings, channels, dims

    sums = ("value_sum",)

    def add_up(self, kept: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {"value_sum": kept["value"].float()}

    def step(self, query: Tensor, cache: LayerCache, spec: SoftmaxSpec) -> Attended:
        settings, metadata = self.settings, cache.metadata
        counts = metadata.once((settings, type(settings.keep)), lambda: Counts.of(settings, metadata, recent=RECENT))
        if counts is None:
            return Attended(attend_all(self, query, cache, spec), None)
        scores = self._scores(query, cache, spec)
        selected = choose(scores, counts, settings.select)
        exact = attend_selected(query, cache, selected, spec)
        share = (1 - self._unread(scores, selected.index, selected.valid, spec))[..., None, None]
        mean = (cache.sum_of("value_sum") / counts.lengths.clamp_min(1).view(-1, 1, 1))[:, :, None, None]
        grouped = exact.unflatten(1, (mean.shape[1], -1)).float()
        out = share * grouped + (1 - share) * mean
        return Attended(out.flatten(1, 2).to(exact.dtype), selected)

    def _scores(self, query: Tensor, cache: LayerCache, spec: SoftmaxSpec) -> Tensor:
        """[B, Hkv, G, S] float32: approximate logits."""
        key = cache.tokens("key")
        grouped = query.squeeze(2).unflatten(1, (key.shape[1], -1))
        magnitude = grouped.abs()
        by_channel = magnitude.sum(2, keepdim=True) if self.settings.select == "group" else magnitude
        channels = by_channel.topk(self.channels).indices
        part = grouped.gather(-1, channels.expand(*grouped.shape[:3], -1))
        batch = torch.arange(key.shape[0], device=key.device).view(-1, 1, 1, 1)
        heads = torch.arange(key.shape[1], device=key.device).view(1, -1, 1, 1)
        dots = (part.unsqueeze(3) @ key.mT[batch, heads, channels]).squeeze(3)
        # The softmax temperature τ = sqrt(D · ‖q_r‖₁ / ‖q‖₁) in place of sqrt(D).
        coverage = part.abs().sum(-1, keepdim=True) / magnitude.sum(-1, keepdim=True).clamp_min(1e-30)
        scores = spec.logits(dots / coverage.clamp_min(1e-30).sqrt())
        valid = cache.metadata.valid()
        return scores if valid is None else scores.masked_fill(~valid[:, None, None], -torch.inf)

    def _unread(self, scores: Tensor, index: Tensor, valid: Tensor, spec: SoftmaxSpec) -> Tensor:
        """[B, Hkv, G]: the share of the approximate softmax on unselected tokens."""
        approximate = spec.softmax(scores)
        read = approximate.gather(-1, index.expand(*approximate.shape[:3], -1)) * valid
        return approximate.sum(-1) - read.sum(-1)

    def selection_bytes(self, reading: Reading) -> int:
        assert isinstance(reading.selected, Selected)
        readers = reading.selected.index.shape[1] * reading.selected.index.shape[2]
        scored = reading.tokens() * readers * reading.widths["key"] // self.dims * self.channels
        return scored + len(reading.metadata.seq_lens) * reading.heads * reading.widths["value_sum"]
