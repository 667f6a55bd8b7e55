"""How many tokens each row holds, on the device."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ..stores.amounts import Budget

T = TypeVar("T")


class Clock:
    """One for all layers. Steps read it on the device; the host counts steps by itself."""

    def __init__(self, lengths: Sequence[int], device: torch.device):
        self.held = torch.tensor(list(lengths), dtype=torch.int32, device=device)
        """[B] tokens before the step: the slot of the coming one."""
        self.seen = self.held + 1
        """[B] tokens with the coming one."""
        self._reckoned: dict[Hashable, object] = {}

    def tick(self) -> None:
        self.held.add_(1)
        self.seen.add_(1)
        self._reckoned.clear()

    def once(self, name: Hashable, reckon: Callable[[], T]) -> T:
        """What `reckon` gives, which is the same in all layers of a step."""
        if name not in self._reckoned:
            self._reckoned[name] = reckon()
        return self._reckoned[name]  # type: ignore[return-value]

    def budgets(self, budget: Budget) -> Tensor:
        """[B] int32: how many of its tokens each row reads."""
        return self.once(("budget", budget.keep, budget.dense_below), lambda: budgets(budget, self.seen))


def budgets(budget: Budget, seen: Tensor) -> Tensor:
    """[B] int32: `budget.of` each of `seen` [B]."""
    if isinstance(budget.keep, float):
        # As count_of rounds: 0.55 · 100 is 55.00000000000001 in floating point and means 55.
        wanted = (seen.double() * budget.keep - 1e-9).ceil().to(torch.int32).clamp_min(1)
    else:
        wanted = torch.full_like(seen, min(budget.keep, torch.iinfo(seen.dtype).max))
    return torch.where(seen < budget.dense_below, seen, torch.minimum(wanted, seen))


def most(budget: Budget, capacity: int) -> int:
    """The largest budget of a row of at most `capacity` tokens."""
    return max(budget.of(capacity), min(capacity, budget.dense_below - 1))
