"""How many tokens each row holds, on the device."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ..stores.amounts import Amount, Budget

T = TypeVar("T")


class Clock:
    """One for all layers. Steps read it on the device; the host counts steps by itself."""

    def __init__(self, lengths: Sequence[int], device: torch.device):
        self.held = torch.tensor(list(lengths), dtype=torch.int32, device=device)
        """[B] tokens before the step: the slot of the coming one."""
        self.seen = self.held + 1
        """[B] tokens with the coming one."""
        self.told: tuple[int, int] | None = None
        """The fewest and the most of `seen`, where the host is there at every step; None: it is not."""
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
    return torch.where(seen < budget.dense_below, seen, share(budget.keep, seen))


def share(amount: Amount, total: Tensor) -> Tensor:
    """[B] int32: `count_of(amount, total)` of each of `total` [B], and 0 of none."""
    if isinstance(amount, float):
        # As count_of rounds: 0.55 · 100 is 55.00000000000001 in floating point and means 55.
        wanted = (total.double() * amount - 1e-9).ceil().to(torch.int32).clamp_min(1)
    else:
        wanted = torch.full_like(total, min(amount, torch.iinfo(total.dtype).max))
    return torch.minimum(wanted, total)


def most(budget: Budget, capacity: int) -> int:
    """The largest budget of a row of at most `capacity` tokens."""
    return max(budget.of(capacity), min(capacity, budget.dense_below - 1))
