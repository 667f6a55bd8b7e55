"""SparQ (Ribar et al., 2024, algorithm 1): scores from the query's largest channels; the mean value stands in
for what is not read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...artifacts import Artifact
from ..attention import Logits
from ..kv.buffers import Places
from .amounts import Amount, check_amount, check_choice, count_of
from .selecting import Chosen, SelectingStore, Selection, best


@dataclass(frozen=True)
class Sparq(Selection):
    rank: Amount = 0.25
    """Channels of the query, of largest magnitude, that are scored."""

    def build(self, layer: int, head_dim: int, artifact: Artifact | None) -> Callable[[], SparqStore]:
        self.check()
        check_choice("select", self.select, ("head", "group"))
        check_amount("rank", self.rank, head_dim, "the head dim")
        return lambda: SparqStore(self)


class SparqStore(SelectingStore):
    selection: Sparq
    _approximate: Tensor
    """[B, Hkv, G, S] approximate softmax of the step."""
    _share: Tensor
    """[B, Hkv, G] how much of it is on what is read, the model's own sink included."""

    def _score(self, query: Tensor, logits: Logits) -> Tensor:
        key = self.rows["key"].view
        magnitude = query.abs()
        of = magnitude.sum(2, keepdim=True) if self.selection.select == "group" else magnitude
        channels = of.topk(count_of(self.selection.rank, query.shape[-1])).indices
        kept = channels.expand(*query.shape[:3], -1)
        part = query.gather(-1, kept)
        batch = torch.arange(key.shape[0], device=key.device).view(-1, 1, 1, 1)
        heads = torch.arange(key.shape[1], device=key.device).view(1, -1, 1, 1)
        read = key.mT[batch, heads, channels]  # [B, Hkv, G or 1, r, S]
        self._read += read.nbytes
        dots = (part.unsqueeze(3) @ read).squeeze(3)
        # The softmax temperature τ = sqrt(D · ‖q_r‖₁ / ‖q‖₁) in place of sqrt(D).
        coverage = part.abs().sum(-1, keepdim=True) / magnitude.sum(-1, keepdim=True).clamp_min(1e-30)
        scores = self._masked(logits.of(dots / coverage.clamp_min(1e-30).sqrt()))
        self._approximate = logits.softmax(scores)
        return scores

    def _choose(self, scores: Tensor, budgets: list[int]) -> Chosen:
        position = torch.arange(scores.shape[-1], device=scores.device)
        lengths = torch.tensor(self.lengths, device=scores.device).view(-1, 1, 1, 1)
        # The most recent quarter of the budget is always read.
        recent = torch.tensor([budget // 4 for budget in budgets], device=scores.device).view(-1, 1, 1, 1)
        local = (position >= lengths - recent) & (position < lengths)
        preferred = (scores.softmax(-1) + local).masked_fill(position >= lengths, -1.0)
        chosen = best(preferred, budgets)
        read = self._approximate.gather(-1, chosen.index.expand(*self._approximate.shape[:3], -1))
        read = read if chosen.counted is None else read * chosen.counted
        self._share = 1 - (self._approximate.sum(-1) - read.sum(-1))
        return chosen

    def _combine(self, query: Tensor, logits: Logits, own: Tensor, chosen: Chosen) -> Tensor:
        exact = super()._combine(query, logits, own, chosen)
        total = self.totals["value"]
        self._read += total.nbytes
        mean = total / torch.tensor(self.lengths, device=total.device).view(-1, 1, 1)
        grouped = exact.unflatten(1, (mean.shape[1], -1)).float()
        share = self._share[..., None, None]
        return (share * grouped + (1 - share) * mean[:, :, None, None]).flatten(1, 2).to(exact.dtype)

    def _extended(self, key: Tensor, value: Tensor, places: Places) -> None:
        counted = value.float()
        if not isinstance(places.slots, slice):
            row, token, _ = places.slots
            mask = torch.zeros(value.shape[0], value.shape[2], dtype=torch.bool, device=value.device)
            mask[row, token] = True
            counted = counted.masked_fill(~mask[:, None, :, None], 0)
        new = counted.sum(2)
        self.totals["value"] = self.totals["value"] + new if "value" in self.totals else new

    def state(self) -> dict[str, Tensor]:
        """Without the sum of the values, which they give anew."""
        return {name: tensor for name, tensor in super().state().items() if name != "totals.value"}

    def restore(self, state: dict[str, Tensor]) -> None:
        super().restore(state)
        if self.lengths:
            self._forget()

    def _forget(self) -> None:
        value = self.rows["value"].view
        position = torch.arange(value.shape[2], device=value.device)
        held = position < torch.tensor(self.lengths, device=value.device).view(-1, 1)
        self.totals["value"] = value.float().masked_fill(~held[:, None, :, None], 0).sum(2)
