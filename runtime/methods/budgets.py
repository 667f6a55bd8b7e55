"""How many tokens each sequence reads, reckoned on the device as `Budget.of` reckons on the host."""

from __future__ import annotations

import torch
from torch import Tensor

from .amounts import Amount, Budget


def budgets(budget: Budget, lengths: Tensor) -> Tensor:
    """[B] int32: `budget.of` for each length in `lengths` [B]."""
    return torch.where(lengths < budget.dense_below, lengths, share(budget.keep, lengths))


def share(amount: Amount, total: Tensor) -> Tensor:
    """[B] int32: `count_of(amount, total)` for each of `total` [B]; 0 where that is 0."""
    if isinstance(amount, float):
        # As count_of rounds: 0.55 · 100 is 55.00000000000001 in floating point and means 55.
        wanted = (total.double() * amount - 1e-9).ceil().to(torch.int32).clamp_min(1)
    else:
        wanted = torch.full_like(total, min(amount, torch.iinfo(total.dtype).max))
    return torch.minimum(wanted, total)
