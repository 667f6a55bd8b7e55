"""Quest (Tang et al., 2024): pages of consecutive tokens, scored by an upper bound of q·k within each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...artifacts import Artifact
from ..attention import Logits
from ..kv.buffers import CHUNK, Places, TokenBuffer
from .amounts import check_count
from .clustered import Clustered, ClusteredStore
from .clusters import Clusters
from .selecting import Chosen, best

MOST_PAGE = 1 << 16
"""Tokens: room for a whole page is made for the first of them."""


@dataclass(frozen=True)
class Quest(Clustered):
    """Whole pages are read, of the budget rounded up to pages; the last, growing page always is."""

    page: int = 16
    """Tokens per page."""

    def build(self, layer: int, head_dim: int, artifact: Artifact | None) -> Callable[[], QuestStore]:
        self.check()
        check_count("page", self.page, 1, MOST_PAGE)
        return lambda: QuestStore(self)


class QuestStore(ClusteredStore):
    selection: Quest

    def __init__(self, settings: Quest):
        super().__init__(settings)
        self.page = settings.page

    def _buffer(self, name: str) -> TokenBuffer:
        """Boxes, one per page, grow when their tokens do."""
        return TokenBuffer(chunk=-(-CHUNK // self.page)) if name in ("low", "high") else super()._buffer(name)

    def _score(self, query: Tensor, logits: Logits) -> Tensor:
        low, high = self.rows["low"].view, self.rows["high"].view
        self._read += low.nbytes + high.nbytes
        # max over the page's box of q·k: the high corner where q > 0, the low one elsewhere
        query, low, high = query.float(), low.float(), high.float()
        bound = logits.of(query.clamp_min(0) @ high.mT + query.clamp_max(0) @ low.mT)
        page = torch.arange(bound.shape[-1], device=bound.device)
        last = self._pages(self.lengths).to(bound.device).view(-1, 1, 1, 1) - 1
        return bound.masked_fill(page > last, -torch.inf)

    def _choose(self, scores: Tensor, budgets: list[int]) -> Chosen:
        page = torch.arange(scores.shape[-1], device=scores.device)
        last = self._pages(self.lengths).to(scores.device).view(-1, 1, 1, 1) - 1
        if self.clusters is None:
            scores = scores.masked_fill(page == last, torch.inf)
        pages = best(scores, self._pages(budgets).tolist())
        index = (pages.index.unsqueeze(-1) * self.page + torch.arange(self.page, device=scores.device)).flatten(-2)
        lengths = torch.tensor(self.lengths, device=scores.device).view(-1, 1, 1, 1)
        counted = index < lengths
        if pages.counted is not None:
            counted &= pages.counted.repeat_interleave(self.page, -1)
        return Chosen(index.minimum(lengths - 1), counted)

    def _extended(self, key: Tensor, value: Tensor, places: Places) -> None:
        extends_all = isinstance(places.slots, slice) or len(places.slots[0]) == key.shape[0]
        if key.shape[2] > 1 or not extends_all or "low" not in self.rows:
            self._rebuild(max(0, min(self.lengths) - key.shape[2]))
        else:
            self._widen(key[:, :, 0])

    def _hide_open(self, scores: Tensor, clusters: Clusters) -> Tensor:
        """Pages all of whose tokens are read anyway; others may hold tokens of both kinds."""
        slot = torch.arange(scores.shape[-1] * self.page, device=scores.device).view(1, 1, 1, -1)
        is_open = clusters.leave_out(slot.expand(scores.shape[0], -1, -1, -1))
        return scores.masked_fill(is_open.unflatten(-1, (-1, self.page)).all(-1), -torch.inf)

    def _forget(self) -> None:
        super()._forget()
        self._rebuild(min(self.lengths))

    def state(self) -> dict[str, Tensor]:
        """Without the boxes, which keys give anew."""
        return {name: tensor for name, tensor in super().state().items() if name not in ("rows.low", "rows.high")}

    def restore(self, state: dict[str, Tensor]) -> None:
        super().restore(state)
        if self.lengths:
            self._rebuild(0)

    def _widen(self, key: Tensor) -> None:
        """One new key [B, Hkv, D] per row: stretch the box of its page."""
        last = torch.tensor(self.lengths, device=key.device) - 1
        row, page = torch.arange(key.shape[0], device=key.device), last // self.page
        first = (last % self.page == 0).view(-1, 1, 1)
        for name, stretch in (("low", torch.minimum), ("high", torch.maximum)):
            rows = self.rows[name]
            rows.reserve(int(self._pages(self.lengths).max()), key.unsqueeze(2))
            rows.used = int(self._pages(self.lengths).max())
            assert rows.tensor is not None
            rows.tensor[row, :, page] = torch.where(first, key, stretch(rows.tensor[row, :, page], key))

    def _rebuild(self, start: int) -> None:
        """Boxes of every page from the one of token `start` on."""
        first, key = start // self.page, self.rows["key"].view
        count = int(self._pages(self.lengths).max())
        part = key[:, :, first * self.page : count * self.page]
        absent = count * self.page - first * self.page - part.shape[2]
        position = torch.arange(first * self.page, count * self.page, device=key.device)
        held = position < torch.tensor(self.lengths, device=key.device).view(-1, 1, 1)
        padded = torch.nn.functional.pad(part, (0, 0, 0, absent))
        limit = torch.finfo(key.dtype).max
        for name, fill, reduce in (("low", limit, torch.amin), ("high", -limit, torch.amax)):
            boxes = reduce(padded.masked_fill(~held.unsqueeze(-1), fill).unflatten(2, (-1, self.page)), 3)
            # A page that a shorter row has not reached would be an infinite box, and 0 · inf is NaN.
            boxes = boxes.masked_fill(boxes.abs() == limit, 0)
            rows = self.rows.setdefault(name, self._buffer(name))
            rows.reserve(count, key)
            assert rows.tensor is not None
            rows.tensor[:, :, first:count] = boxes
            rows.used = count

    def _pages(self, lengths: list[int]) -> Tensor:
        return -(-torch.tensor(lengths) // self.page)
