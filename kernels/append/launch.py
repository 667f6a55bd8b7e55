"""The kernel in numba, called with tensors."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from torch import Tensor

from ..codes import BITS, STEP, Calibrated
from ..cpu import array, float_kind, run
from ..cpu.pages import one_page_each, table_of
from ..cpu.rows import CODES
from ..scan.operands import Tokens
from . import cpu

STEPS_OF = {bits: cpu.Steps(bits, np.float32(STEP.get(bits, np.inf)), np.float32(np.inf)) for bits in BITS}


def append_coded(
    key_new: Tensor, value_new: Tensor, tokens: Tokens, tables: Calibrated, lengths: Tensor, bits: int,
    table: Tensor | None,
) -> None:  # fmt: skip
    """See `kvcal.kernels.append.append_coded`; the operands are checked."""
    batch, heads, width = key_new.shape
    kind = CODES if tokens.key_scale is not None else float_kind(tokens.key)
    widest = max(width, value_new.shape[-1], tables["key_map"].shape[-1])
    lines, codes = workspace(batch * heads, widest, tokens.reduced.shape[-1])
    pages = one_page_each(batch, tokens.key.shape[2]) if table is None else table_of(table)
    run(
        cpu.append_coded, array(key_new), array(value_new), kind, float_kind(key_new), tokens.arrays, pages,
        tables.arrays, lengths.numpy(), STEPS_OF[bits], lines, codes,
    )  # fmt: skip


@lru_cache(maxsize=4)
def workspace(units: int, width: int, code: int) -> tuple[Any, Any]:
    """`lines` and `codes` of the kernel; the same for all layers and steps."""
    return np.empty((units, 4, width), np.float32), np.empty((units, code), np.uint8)
