"""H2O (Zhang et al., 2023): the tokens that have received most attention, and the most recent ones, half and half.

Evicted per KV head: the attention of the query heads that share it is added up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...artifacts import Artifact, KvcalError
from ..attention import Logits, attention_mass, probabilities, weighted
from ..kv.saved import Saved, require
from ..methods.amounts import Budget
from .evicting import EvictingStore

if TYPE_CHECKING:
    from .full import FullStore


@dataclass(frozen=True)
class H2O(Budget):
    """Half of what is kept for recent tokens, the rest for heavy hitters."""

    def build(self, layer: int, head_dim: int, artifact: Artifact | None) -> Callable[[], H2OStore]:
        self.check()
        return lambda: H2OStore(self)


class H2OStore(EvictingStore):
    takes_mass = True
    _paused: Tensor | None = None
    """[B] bool, which rows got no token at this step; None: all got one."""

    def __init__(self, settings: H2O):
        super().__init__("h2o", settings)

    def _worth(self, lengths: Tensor, budgets: Tensor) -> Tensor:
        position = self.rows["position"].view.squeeze(-1)
        recent = position >= lengths - budgets // 2
        return self.rows["mass"].view.squeeze(-1).masked_fill(recent, float("inf"))

    def attend(self, query: Tensor, logits: Logits) -> Tensor:
        key, value = self.rows["key"].view, self.rows["value"].view
        self._read = sum(rows.view.nbytes for rows in self.rows.values())
        weights = probabilities(query, key, logits, self._held())  # [B, Hkv, G, 1, slots]
        received = weights.sum((2, 3)).unsqueeze(-1)
        if self._paused is not None:  # its query is padding
            received = received.masked_fill(self._paused.to(key.device).view(-1, 1, 1, 1), 0)
        self.rows["mass"].view.add_(received)
        return weighted(weights, value).to(query.dtype)

    def _append(self, key: Tensor, value: Tensor, valid: Tensor | None) -> None:
        self._paused = None if valid is None else ~valid[:, 0]
        super()._append(key, value, valid)

    def _check_held(self, saved: Saved, position: Tensor, held: list[int]) -> None:
        """The recent half of the budget; of the others only their attention knows."""
        mass = saved.take("rows.mass", torch.float32, *saved.key.shape[:3], 1)
        require("mass", mass >= 0, "no negative attention")
        for row, (length, count) in enumerate(zip(saved.lengths, held, strict=True)):
            recent = min(count, self.budget.of(length) // 2)
            wanted = torch.arange(length - recent, length)
            require("position", position[row, :, count - recent : count] == wanted, "the most recent tokens")

    def adopt(self, full: FullStore) -> None:
        if "mass" not in full.totals:
            raise KvcalError("h2o can only adopt a cache that recorded attention: prefill with full, record_mass=True")
        super().adopt(full)
        self.rows["mass"].view.copy_(full.totals["mass"].unsqueeze(-1))

    def _attended(self, query: Tensor, logits: Logits, limits: Tensor | None) -> None:
        mass = attention_mass(query, self.rows["key"].view, logits, limits)
        self.rows["mass"].view.add_(mass.unsqueeze(-1))

    def _fresh(self, key: Tensor) -> dict[str, Tensor]:
        return {"mass": torch.zeros(*key.shape[:3], 1, dtype=torch.float32, device=key.device)}
