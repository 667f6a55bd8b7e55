"""Block tables: whether one fits, and what of it may be read."""

from __future__ import annotations

import torch
from torch import Tensor

from . import PAGE

__all__ = ["capacity_of", "check_table", "within"]


def capacity_of(part: Tensor, table: Tensor | None) -> int:
    """Tokens that a sequence may have: of a part by sequence, or by page with a table."""
    return part.shape[2] if table is None else table.shape[1] * PAGE


def check_table(table: Tensor | None, batch: int, device: torch.device) -> None:
    """ValueError unless `table` is None or a block table [batch, P], the numbers of a sequence next to one another."""
    if table is None:
        return
    whole = table.dtype in (torch.int32, torch.int64)
    if not whole or table.dim() != 2 or table.shape[0] != batch or table.device != device:
        raise ValueError(
            f"table: received {table.dtype} {list(table.shape)} on {table.device}, "
            f"expected int32 or int64 [{batch}, P] on {device}"
        )
    if table.shape[1] > 1 and table.stride(1) != 1:
        raise ValueError(f"table: received stride {table.stride(1)} over the pages of a sequence, expected 1")


def within(table: Tensor | None, lengths: Tensor) -> Tensor | None:
    """The table with page 0 beyond what sequences of these lengths [B] have, where anything may stand."""
    if table is None:
        return None
    start = torch.arange(table.shape[1], device=table.device) * PAGE
    return table.masked_fill(start >= lengths.unsqueeze(-1), 0)
