"""Quest (Tang et al., 2024): pages of consecutive tokens, scored by an upper bound of q·k within each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...artifacts import Artifact, KvcalError
from ..attention import SoftmaxSpec
from ..kv.pages import PAGE, LayerCache
from .amounts import check_count
from .base import Attended, Marked, Method, Policy, Reading, Selected
from .budgets import budgets
from .choosing import Selection, attend_selected, highest, shared
from .full import attend_all


@dataclass(frozen=True)
class Quest(Selection, Method):
    """Whole pages are read, as many as the budget rounded up to pages; the last, growing page is always read."""

    page: int = 16
    """Tokens per page; they divide the 64 that lie together in memory."""
    sinks: int = 1
    """First tokens whose pages are always read."""
    recent: int = 0
    """Last tokens whose pages are always read."""

    def check(self) -> None:
        super().check()
        check_count("page", self.page, 1)
        if PAGE % self.page:
            raise KvcalError(f"page {self.page}: give 1, 2, 4, 8, 16, 32 or 64 tokens")
        check_count("sinks", self.sinks)
        check_count("recent", self.recent)

    def bind(self, layer: int, head_dim: int, artifact: Artifact | None) -> QuestPolicy:
        self.check()
        return QuestPolicy(self)


@dataclass(frozen=True)
class Pages:
    """What is read of each sequence, in pages of `Quest.page` tokens; the same in all layers."""

    last: Tensor
    """[B, 1, 1, 1] int64: the page of the last token."""
    absent: Tensor
    """[B, 1, 1, U] bool: pages beyond the last one of the sequence."""
    always: Tensor
    """[B, 1, 1, U] bool: pages that are read whatever their bound."""
    wanted: Tensor
    """[B] int64: pages that are read."""
    most: int
    """`wanted` is nowhere larger."""
    even: bool
    """Whether `wanted` is `most` everywhere."""


class QuestPolicy(Policy):
    def __init__(self, settings: Quest):
        self.settings, self.page = settings, settings.page
        self.summarised, self.summarise_every = ("key",), settings.page

    def summarise(self, page: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """ "low" and "high" [n, Hkv, PAGE / page · D]: the bounding boxes of the keys of each of Quest's pages."""
        keys = page["key"].transpose(1, 2).unflatten(2, (-1, self.page))
        return {"low": keys.amin(3).flatten(2), "high": keys.amax(3).flatten(2)}

    def step(self, query: Tensor, cache: LayerCache, spec: SoftmaxSpec) -> Attended:
        settings, metadata = self.settings, cache.metadata
        if settings.of(metadata.longest) == metadata.longest:
            return Attended(attend_all(self, query, cache, spec), None)
        pages = metadata.once(settings, lambda: self._pages(cache))
        bounds = shared(self._bounds(query, cache, pages, spec), settings.select)
        chosen = highest(bounds.masked_fill(pages.always, torch.inf), pages.wanted, pages.most, pages.even)
        offset = torch.arange(self.page, device=query.device)
        index = (chosen.index.unsqueeze(-1) * self.page + offset).flatten(-2)
        lengths = metadata.seq_lens.long().view(-1, 1, 1, 1)
        valid = (index < lengths) & chosen.valid.repeat_interleave(self.page, -1)
        selected = Selected(index.masked_fill(~valid, 0), valid)
        return Attended(attend_selected(query, cache, selected, spec), selected)

    def _pages(self, cache: LayerCache) -> Pages:
        settings, metadata, page = self.settings, cache.metadata, self.page
        lengths = metadata.seq_lens.long()
        even = metadata.shortest == metadata.longest
        last = (lengths - 1).clamp_min(0) // page
        number = torch.arange(-(-metadata.longest // page), device=lengths.device)
        first = -(-settings.sinks // page)
        recent = ((lengths - settings.recent).clamp_min(0) // page).minimum(last)
        always = ((number < first) | (number >= recent.unsqueeze(1))) & (number <= last.unsqueeze(1))
        wanted = (-(-budgets(settings, metadata.seq_lens).long() // page)).maximum(always.sum(1))
        most = -(-(settings.of if even else settings.most)(metadata.longest) // page)
        most = min(len(number), max(most, first + -(-settings.recent // page) + 1))
        if settings.sinks or settings.recent:
            even = False
        last = last.unsqueeze(1)
        return Pages(last[:, None, None], (number > last)[:, None, None], always[:, None, None], wanted, most, even)

    def _bounds(self, query: Tensor, cache: LayerCache, pages: Pages, spec: SoftmaxSpec) -> Tensor:
        """[B, Hkv, G, U] float32: upper bounds of q·k within each page; -inf where a sequence has no such page."""
        low, high = (cache.summary(name) for name in ("low", "high"))
        count, (batch, heads), dims = pages.absent.shape[-1], low.shape[:2], query.shape[-1]
        low, high = (corner.reshape(batch, heads, -1, dims)[:, :, :count].float() for corner in (low, high))
        grouped = query.squeeze(2).unflatten(1, (heads, -1)).float()
        # Over the box of a page q·k is largest in the high corner where q > 0, in the low one elsewhere.
        over, under = grouped.clamp_min(0), grouped.clamp_max(0)
        bound = over @ high.mT + under @ low.mT
        low, high = self._last_box(cache, pages)
        bound = bound.scatter(-1, pages.last.expand(*bound.shape[:3], 1), over @ high.mT + under @ low.mT)
        return spec.logits(bound).masked_fill(pages.absent, -torch.inf)

    def _last_box(self, cache: LayerCache, pages: Pages) -> tuple[Tensor, Tensor]:
        """Both corners [B, Hkv, 1, D] float32 of the box of the last, growing page."""
        length = cache.metadata.seq_lens.long().unsqueeze(1)
        index = pages.last.flatten(1) * self.page + torch.arange(self.page, device=length.device)
        index = index.minimum((length - 1).clamp_min(0)).unsqueeze(1).expand(-1, cache.heads, -1)
        (key,) = cache.gather(("key",), index)
        return key.amin(2, keepdim=True).float(), key.amax(2, keepdim=True).float()

    def tokens_read(self, selected: Selected | Marked) -> Tensor:
        """Pages count whole, the growing one, too."""
        assert isinstance(selected, Selected)
        return selected.valid.unflatten(-1, (-1, self.page)).any(-1).sum() * self.page

    def selection_bytes(self, reading: Reading) -> int:
        boxes = (reading.metadata.seq_lens + self.page - 1) // self.page
        width = (reading.widths["low"] + reading.widths["high"]) * self.page // PAGE
        return int(boxes.sum()) * reading.heads * width
