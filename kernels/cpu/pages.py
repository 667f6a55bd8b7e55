"""Where tokens lie: in pages that a block table names, or, without one, in one page for each sequence.

Every part of what is kept is a list of rows, [rows, width], from which steps lead to a page, a head and a token.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..pages import PAGE, rows_of
from . import compiled

Table = namedtuple("Table", "pages size")
"""[B, P] int64 numbers of pages, and how many tokens each has."""
Spans = namedtuple("Spans", "page offset begin count")
"""[n] int64 each: tokens of a block that lie in one page, its number, the first one's place in the page and in the
block, and how many there are."""


@compiled()
def row(steps, page, head, offset):
    """The row of a token in a part with these steps, [3] int64."""
    return page * steps[0] + head * steps[1] + offset * steps[2]


@compiled()
def spans_in(room):
    """Spans that are written to room [4, n] int64."""
    return Spans(room[0], room[1], room[2], room[3])


@compiled()
def find(table, sequence, first, step, count, spans):
    """How many spans tokens first, first + step, …, `count` of them, lie in; they are written to `spans`."""
    pages, size = table.pages[sequence], table.size
    found = np.int64(0)
    at = np.int64(0)
    while at < count:
        token = first + at * step
        number = token // size
        offset = token - number * size
        many = min(count - at, (size - offset + step - 1) // step)
        spans.page[found], spans.offset[found] = pages[number], offset
        spans.begin[found], spans.count[found] = at, many
        at += many
        found += 1
    return found


def table_of(table: Tensor) -> Any:
    """
    Args:
        table: [B, P] whole numbers.
    """
    return Table(table.to(torch.int64).contiguous().numpy(), np.int64(PAGE))


@lru_cache(maxsize=64)
def one_page_each(sequences: int, capacity: int) -> Any:
    """The table of caches without one, in which each sequence lies by itself."""
    return Table(np.arange(sequences).reshape(-1, 1), np.int64(max(1, capacity)))


def lists_of(parts: Sequence[tuple[Tensor | None, Callable[[Tensor], Any], Any]]) -> tuple[list[Any], Any]:
    """([rows, width] of every part, [parts, 3] int64 steps)

    Args:
        parts: (part or None, what makes an array of [rows, width], the array in place of None).
    """
    arrays, steps = [], np.zeros((len(parts), 3), np.int64)
    for number, (part, as_array, none) in enumerate(parts):
        if part is None:
            arrays.append(none)
        else:
            rows, steps[number] = rows_of(part)
            arrays.append(as_array(rows))
    return arrays, steps
