"""A layer's cache in pages that a serving engine allocates, frees, shares between sequences and moves.

All that a method keeps lies in these pages, with the tokens that it is kept of. So whoever is given a page reads what
belongs to the tokens in it, whether this sequence wrote them, or another one with the same prefix, and of a page that
is used again nothing is left. No state of a sequence is kept: what a method adds up over a sequence (`Policy.sums`) is
added up by page, and the pages when it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ...kernels.pages import PAGE, PageLayout, Part
from .layer import Layout
from .pages import DecodeMetadata, LayerCache, Summarise


class Keeping(Layout, Protocol):
    """What is kept of tokens; see `methods.base.Policy`."""

    def encode(self, key: Tensor, value: Tensor) -> Mapping[str, Tensor]: ...


def layout_of(policy: Keeping, heads: int, head_dim: int, value_dim: int, dtype: torch.dtype) -> PageLayout:
    """Where in a page lies what a policy keeps of tokens, of pages, and of what it adds up.

    Args:
        dtype: of the model's keys and values.
    """
    key, value = (torch.empty(0, heads, 0, width, dtype=dtype) for width in (head_dim, value_dim))
    kept = policy.encode(key, value)
    parts = {name: Part(tensor.shape[3], tensor.dtype) for name, tensor in kept.items()}
    no_pages = {name: tensor.new_empty(0, PAGE, heads, tensor.shape[3]) for name, tensor in kept.items()}
    of_pages = {**policy.summarise(no_pages), **added_up(policy, no_pages)}
    return PageLayout(parts | {name: Part(tensor.shape[2], tensor.dtype, True) for name, tensor in of_pages.items()})


def added_up(policy: Layout, page: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """[n, Hkv, …] by name: what the tokens of pages, [n, PAGE, Hkv, …] by name, add to the policy's sums."""
    if not policy.sums:
        return {}
    of_heads = {name: tensor.transpose(1, 2) for name, tensor in page.items()}
    return {name: tensor.sum(2) for name, tensor in policy.add_up(of_heads).items()}


def of_page(page: Mapping[str, Tensor], policy: Layout, by: Summarise) -> Mapping[str, Tensor]:
    """[n, Hkv, …] by name: the rows that stand for pages, [n, PAGE, Hkv, …] by name: summaries and sums."""
    return {**by({name: page[name] for name in policy.summarised}), **added_up(policy, page)}


@dataclass(frozen=True, eq=False)
class EngineCache(LayerCache):
    """The pages as a step sees them, with the block table of a batch."""

    policy: Keeping | None = None

    @classmethod
    def over(cls, pieces: Tensor, layout: PageLayout, policy: Keeping, metadata: DecodeMetadata) -> EngineCache:
        """
        Args:
            pieces: [N, Hkv, layout.nbytes or more] uint8.
        """
        parts = layout.parts_of(pieces)
        pages = {name: part.transpose(1, 2) for name, part in parts.items() if not layout.parts[name].of_page}
        of_pages = {name: part.squeeze(2) for name, part in parts.items() if layout.parts[name].of_page}
        return cls(pages, of_pages, {}, metadata, policy=policy)

    def at(self, metadata: DecodeMetadata) -> EngineCache:
        """The same pages, with the block table of another batch."""
        return replace(self, metadata=metadata)

    def tokens(self, name: str) -> Tensor:
        """As before, and zeros beyond a sequence's tokens, where another may have left anything."""
        ordered, valid = super().tokens(name), self.metadata.valid()
        return ordered if valid is None else ordered.masked_fill(~valid[:, None, :, None], 0)

    def summary(self, name: str) -> Tensor:
        """As before, and zeros of pages that were not summarised yet."""
        assert self.policy is not None
        ordered, every = super().summary(name), self.policy.summarise_every
        written = -(-(self.metadata.seq_lens.long() // every * every) // PAGE)
        made = torch.arange(ordered.shape[2], device=ordered.device) < written.unsqueeze(1)
        return ordered.masked_fill(~made[:, None, :, None], 0)

    def write(self, new: Mapping[str, Tensor], slots: Tensor) -> None:
        """Put [1, Hkv, T, …] of each name into slots [T] int64, page · PAGE + place; those of padding, below 0, into
        page 0, which engines leave to nobody."""
        slots = slots.clamp_min(0)
        places = slots // PAGE, slots % PAGE
        for name, tensor in new.items():
            self.pages[name].index_put_(places, tensor[0].transpose(0, 1).to(self.pages[name].dtype))

    def summarise(self, page: Tensor, names: Sequence[str], by: Summarise) -> None:
        super().summarise(page, *self._with_sums(names, by))

    def summarise_last(self, names: Sequence[str], by: Summarise, every: int) -> None:
        super().summarise_last(*self._with_sums(names, by), every)

    def _with_sums(self, names: Sequence[str], by: Summarise) -> tuple[Sequence[str], Summarise]:
        assert self.policy is not None
        if not self.policy.sums:
            return names, by
        return tuple(self.pages), partial(of_page, policy=self.policy, by=by)

    def add_last(self, new: Mapping[str, Tensor]) -> None:
        """Nothing: `sum_of` adds the tokens of a page up until it is full."""

    def sum_of(self, name: str) -> Tensor:
        """[B, Hkv, …], of full pages and of the tokens in the last one, if that is not full."""
        assert self.policy is not None
        lengths = self.metadata.seq_lens.long().unsqueeze(1)
        sums = self.summary(name)
        full = torch.arange(sums.shape[2], device=sums.device) < lengths // PAGE
        total = sums.masked_fill(~full[:, None, :, None], 0).sum(2)
        index = lengths // PAGE * PAGE + torch.arange(PAGE, device=sums.device)
        valid = (index < lengths)[:, None, :, None]
        index = index.minimum((lengths - 1).clamp_min(0)).unsqueeze(1).expand(-1, self.heads, -1)
        last = dict(zip(self.pages, self.gather(tuple(self.pages), index), strict=True))
        return total + self.policy.add_up(last)[name].masked_fill(~valid, 0).sum(2)
