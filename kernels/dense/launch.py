"""The kernel in numba, called with tensors."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..cpu import LOG2_E, array, by_head_and_query, cut, float_kind, nothing, run
from ..cpu.pages import lists_of, one_page_each, table_of
from ..cpu.rows import Rows
from ..pages.table import capacity_of
from . import cpu

LEAST_RANGE = 512
"""Tokens below which a range is not worth its partial result."""


def dense(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, *, scaling: float, softcap: float | None,
    sink_logits: Tensor | None, out: Tensor | None, table: Tensor | None,
) -> Tensor:  # fmt: skip
    """See `kvcal.kernels.dense.dense`; the operands are checked."""
    batch, heads, group, width = query.shape
    capacity = capacity_of(key, table)
    lengths = lengths.clamp_max(capacity)
    values, longest = value.shape[-1], max(1, int(lengths.max()))
    ranges, per_range = cut(batch * heads, longest, torch.get_num_threads(), LEAST_RANGE, cpu.BLOCK)
    found = torch.empty(batch, heads, group, values)
    cap = np.float32(0 if softcap is None else softcap * LOG2_E)
    scaled = (query.detach().float() * (scaling * LOG2_E)).contiguous().numpy()
    pages = one_page_each(batch, capacity) if table is None else table_of(table)
    run(
        cpu.dense, scaled, rows_of(key, value), pages, float_kind(key), lengths.numpy(), cap,
        by_head_and_query(sink_logits, heads, group), workspace(batch * heads * ranges, group, width, values), ranges,
        per_range, found.numpy(),
    )  # fmt: skip
    return found.to(query.dtype) if out is None else out.copy_(found)


def rows_of(key: Tensor, value: Tensor) -> Rows:
    scales, codewords = nothing(0, dtype=np.int16), nothing(0)
    no_codes = ((None, array, scales), (None, array, scales), (None, array, codewords))
    arrays, steps = lists_of(((key, array, None), (value, array, None), *no_codes))
    return Rows._make([*arrays, steps])


@lru_cache(maxsize=4)
def workspace(parts: int, group: int, width: int, values: int) -> cpu.Parts:
    """What the kernel writes beside its result; the same for all layers and steps."""
    return cpu.Parts(
        best=np.empty((parts, group), np.float32), mass=np.empty((parts, group), np.float32),
        rows=np.empty((parts, group, values), np.float32), words=np.empty((0, group), np.float32),
        logits=np.empty((parts, group, cpu.BLOCK), np.float32), reads=np.ones((1, cpu.BLOCK), np.uint8),
        pages=np.empty((parts, cpu.BLOCK), np.int64), offsets=np.empty((parts, cpu.BLOCK), np.int64),
        spans=np.empty((parts, 4, cpu.BLOCK), np.int64), lines=np.empty((parts, 4, max(width, values)), np.float32),
    )  # fmt: skip
