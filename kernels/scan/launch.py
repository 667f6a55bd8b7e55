"""The kernel in numba, called with tensors."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..codes import OFFSET
from ..cpu import KINDS, LOG2_E, array, as_int32, by_head_and_query, cut, nothing, run, short
from ..cpu.pages import lists_of, one_page_each, table_of
from ..cpu.rows import CODES
from . import cpu, cpu_choice
from .cpu_codes import BLOCK, LANES, ROWS
from .operands import Budget, Tables, Tokens

SELECTS = {"group": cpu_choice.GROUP, "max": cpu_choice.MAX, "head": cpu_choice.HEAD}
LEAST_RANGE = 1024
"""Tokens below which a range is not worth its partial result."""


def tokens_of(tokens: Tokens) -> cpu.Tokens:
    none, numbers = nothing(0), nothing(0, dtype=np.int16)

    def one_each(rows: Tensor) -> Any:
        return array(rows.squeeze(-1))

    arrays, steps = lists_of((
        (tokens.reduced, as_int32, None), (tokens.scale, one_each, numbers), (tokens.codeword, one_each, none),
        (tokens.key, array, None), (tokens.value, array, None), (tokens.key_scale, one_each, numbers),
        (tokens.value_scale, one_each, numbers), (tokens.correction, array, nothing(0, 0)),
        (tokens.correction_scale, one_each, numbers),
    ))  # fmt: skip
    return cpu.Tokens._make([*arrays, steps, np.ascontiguousarray(steps[list(cpu.OF_ROWS)])])


def tables_of(tables: Tables) -> cpu.Tables:
    heads, width, _ = tables.query_map.shape
    none = nothing(heads, 0, width, dtype=np.int16), nothing(0, 0, dtype=np.float32)
    key, value = (none[0] if part is None else short(part) for part in (tables.key, tables.value))
    turn_key, turn_value = (none[1] if part is None else part.numpy() for part in (tables.turn_key, tables.turn_value))
    return cpu.Tables(tables.query_map.numpy(), key, value, turn_key, turn_value)


def budget_of(budget: Budget) -> cpu.Budget:
    parts = budget.first, budget.begin, budget.lengths, budget.stride, budget.rank
    return cpu.Budget(*(part.long().numpy() for part in parts))


def scan(
    query: Tensor, tokens: Tokens, tables: Tables, budget: Budget, *, table: Tensor | None, bits: int | None,
    select: str, residual: bool, scaling: float, softcap: float | None, sink_logits: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `kvcal.kernels.scan.scan`; the operands are checked."""
    batch, heads, group, _ = query.shape
    settings = settings_of(bits, tokens.reduced.dtype, tokens.key.dtype, select, residual, scaling, softcap)
    sink_logits_of = by_head_and_query(sink_logits, heads, group)
    ranges, per_range = cut(batch * heads, budget.longest, torch.get_num_threads(), LEAST_RANGE, BLOCK)
    out = torch.empty(batch, heads, group, tokens.value.shape[-1])
    read = torch.empty(batch, heads, group if select == "head" else 1, budget.longest, dtype=torch.uint8)
    # A power of two, so that few workspaces are made as sequences grow.
    sampled = 1 << max(0, budget.sampled - 1).bit_length()
    units, parts = workspace(
        batch * heads, group, ranges, read.shape[2], sampled, query.shape[-1],
        tokens.value.shape[-1], tables.query_map.shape[-1], 0 if tables.key is None else tables.key.shape[1],
        tokens.key.dtype == torch.uint8,
    )  # fmt: skip
    run(
        cpu.scan, query.detach().float().contiguous().numpy(), tokens.arrays,
        one_page_each(batch, tokens.key.shape[2]) if table is None else table_of(table), tables.arrays, budget.arrays,
        settings, sink_logits_of, units, parts, ranges, per_range, read.numpy(), out.numpy(),
    )  # fmt: skip
    return out, read.view(torch.bool)


@lru_cache(maxsize=64)
def settings_of(
    bits: int | None, reduced: torch.dtype, rows: torch.dtype, select: str, residual: bool, scaling: float,
    softcap: float | None,
) -> cpu.Settings:  # fmt: skip
    """What the kernel is told of numbers; the same for all steps of a layer."""
    return cpu.Settings(
        bits=KINDS[reduced] if bits is None else bits,
        offset=np.float32(0 if bits is None else OFFSET[bits]),
        kind=CODES if rows == torch.uint8 else KINDS[rows],
        mode=SELECTS[select],
        residual=residual,
        factor=np.float32(scaling * LOG2_E),
        cap=np.float32(0 if softcap is None else softcap * LOG2_E),
    )


@lru_cache(maxsize=4)
def workspace(
    units: int, group: int, ranges: int, marks: int, sampled: int, width: int, values: int, rank: int, codewords: int,
    coded: bool,
) -> tuple[cpu.Units, cpu.Parts]:  # fmt: skip
    """What the kernel writes beside its results; the same for all layers and steps."""
    parts, lanes, exact_words = units * ranges, -(-group // LANES) * LANES, codewords if coded else 0

    def floats(*shape: int) -> Any:
        return np.empty(shape, np.float32)

    of_units = cpu.Units(
        floats(units, group, rank), floats(units, group), floats(units, codewords, lanes), floats(units, group, width),
        floats(units, group), floats(units, group), floats(units, group, sampled), floats(units, sampled),
    )  # fmt: skip
    of_parts = cpu.Parts(
        best=floats(parts, group), mass=floats(parts, group), rows=floats(parts, group, values),
        exact_words=floats(parts, exact_words, group), other_mass=floats(parts, group),
        words=floats(parts, codewords, lanes), pages=floats(parts, group, values),
        codes=np.empty((parts, BLOCK), np.int32), numbers=floats(parts, ROWS, BLOCK), spread=floats(parts, BLOCK),
        codewords=np.empty((parts, BLOCK), np.uint8), logits=floats(parts, lanes, BLOCK),
        score=floats(parts, group, BLOCK), exact=floats(parts, group, BLOCK),
        reads=np.empty((parts, marks, BLOCK), np.uint8), marks=np.empty((parts, marks, BLOCK), np.uint8),
        some=np.empty((parts, BLOCK), np.uint8), chosen_page=np.empty((parts, BLOCK), np.int64),
        chosen_offset=np.empty((parts, BLOCK), np.int64), spans=np.empty((parts, 4, BLOCK), np.int64),
        lines=floats(parts, 4, max(width, values, rank)),
    )  # fmt: skip
    return of_units, of_parts
