"""How many tokens each row holds, on the device."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch

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
