"""Pages that an engine allocates: of each page and KV head one piece of memory, which holds all that is kept of its
tokens. Whatever moves, shares or frees a page moves, shares or frees all of it.

In a piece every part lies by itself, so that the codes of a page, which every step reads, are read without its keys
and values. Only these two alternate where they are equally wide: token by token [key | value], as FlashAttention takes
them.

Kernels take parts as `PageLayout.parts_of` gives them, [N, Hkv, PAGE, width], or [N, Hkv, 1, width] of a page as a
whole, with a block table [B, P]: token t of sequence b lies in page table[b, t // PAGE], at t % PAGE. Without a block
table the same parts are [B, Hkv, capacity, width].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ALIGNED", "PAGE", "PageLayout", "Part", "in_rows", "ordered", "page_strides", "rows_of"]

PAGE = 64
"""Tokens of a page."""
ALIGNED = 64
"""Bytes: where parts begin."""


@dataclass(frozen=True)
class Part:
    """What is kept of each token, or of a page as a whole."""

    width: int
    """Numbers."""
    dtype: torch.dtype
    of_page: bool = False

    @property
    def nbytes(self) -> int:
        """Of a token, or of a page."""
        return self.width * self.dtype.itemsize


class PageLayout:
    """Where parts lie in the piece of a page and KV head."""

    def __init__(self, parts: Mapping[str, Part]):
        """
        Args:
            parts: by name, "key" and "value" among them.
        """
        self.parts = dict(parts)
        key, value = self.parts["key"], self.parts["value"]
        self.alternating = key == value
        """Whether keys and values alternate."""
        self._offsets: dict[str, int] = {}
        end = 0
        for name, part in self.parts.items():
            if name == "value" and self.alternating:
                self._offsets[name] = self._offsets["key"] + key.nbytes
                continue
            self._offsets[name] = end
            rows = 1 if part.of_page else 2 * PAGE if name == "key" and self.alternating else PAGE
            end = -(-(end + rows * part.nbytes) // ALIGNED) * ALIGNED
        self.unit = math.lcm(PAGE, *(part.nbytes for part in self.parts.values()))
        """Bytes of which pieces have a multiple: from one to the next there is a whole number of each part's rows."""
        self.nbytes = -(-end // self.unit) * self.unit
        """Of the piece of a page and head, at least."""

    def parts_of(self, pieces: Tensor) -> dict[str, Tensor]:
        """Views of every part, [N, Hkv, PAGE or 1, width].

        Args:
            pieces: [N, Hkv, nbytes or more] uint8, the bytes of a piece next to one another, all strides multiples of
                every part's numbers.
        """
        found = {}
        for name, part in self.parts.items():
            numbers = pieces.view(part.dtype)
            rows = 1 if part.of_page else PAGE
            pitch = part.width * (2 if self.alternating and name in ("key", "value") else 1)
            start = numbers.storage_offset() + self._offsets[name] // part.dtype.itemsize
            shape, strides = (*numbers.shape[:2], rows, part.width), (*numbers.stride()[:2], pitch, 1)
            found[name] = numbers.as_strided(shape, strides, start)
        return found


def ordered(part: Tensor, table: Tensor | None) -> Tensor:
    """[B, Hkv, capacity, width]: a part by sequence; a copy where there is a block table."""
    return part if table is None else part[table.long()].transpose(1, 2).flatten(2, 3)


def page_strides(parts: Sequence[Tensor]) -> tuple[int, int] | None:
    """From one page to the next, and from one head to the next, in all of these parts, in multiples of `ALIGNED` bytes;
    None: they are not all in the same pieces, with the numbers of a token next to one another."""
    found = {tuple(stride * part.itemsize for stride in part.stride()[:2]) for part in parts}
    one_piece = len(found) == 1 and all(part.stride(3) == 1 or part.shape[3] == 1 for part in parts)
    by_page, by_head = next(iter(found))
    if not one_piece or by_page % ALIGNED or by_head % ALIGNED:
        return None
    return by_page // ALIGNED, by_head // ALIGNED


def in_rows(part: Tensor) -> bool:
    """Whether tokens, or pages, lie a whole number of rows apart, the numbers of each next to one another."""
    width = part.shape[3]
    apart = [stride for stride, size in zip(part.stride()[:3], part.shape[:3], strict=True) if size > 1]
    return (width == 1 or part.stride(3) == 1) and all(stride % width == 0 for stride in apart)


def rows_of(part: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """(the memory that a part `in_rows` begins, [rows, width]; rows from one sequence or page to the next, from head to
    head and from token to token)"""
    part, width = part.detach(), part.shape[3]
    numbers = part.untyped_storage().nbytes() // part.itemsize - part.storage_offset()
    steps = tuple(
        0 if size <= 1 else stride // width for stride, size in zip(part.stride(), part.shape[:3], strict=False)
    )
    return part.as_strided((numbers // width, width), (width, 1)), steps  # type: ignore[return-value]
