"""Stores that hold a budget of tokens and forget the rest: `streaming` and `h2o`."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from ...artifacts import KvcalError
from ..attention import Logits, causal_attention
from ..kv.buffers import lengths_mask
from ..kv.saved import Saved, require
from ..methods.amounts import Budget
from .forgetting import ForgettingStore


class EvictingStore(ForgettingStore):
    """Slots [B, Hkv, slots]: the first `held` of a row are taken, in no order; `position` says by which token."""

    books = ("held",)

    def __init__(self, name: str, budget: Budget) -> None:
        super().__init__(name)
        self.budget = budget
        self.held: list[int] = []
        """Tokens held by each row, the same number in every KV head."""

    @abstractmethod
    def _worth(self, lengths: Tensor, budgets: Tensor) -> Tensor:
        """[B, Hkv, slots] float, the least goes first, inf never; both arguments [B, 1, 1], of the coming step."""

    def prefill(self, query: Tensor, key: Tensor, value: Tensor, logits: Logits, valid: Tensor | None = None) -> Tensor:
        limits = self._take(key, value, valid)
        # Queries at padding positions attend to nothing that should count.
        seen = limits if limits is None or valid is None else limits.masked_fill(~valid.to(limits.device), 0)
        self._attended(query, logits, seen)
        return causal_attention(query, self.rows["key"].view, self.rows["value"].view, logits, limits)

    def _append(self, key: Tensor, value: Tensor, valid: Tensor | None) -> None:
        comes = [True] * key.shape[0] if valid is None else valid[:, 0].tolist()
        if not self.lengths or not any(comes):
            self._take(key, value, valid)
            return
        # A row that gets nothing loses nothing.
        rows = zip(self.lengths, self.held, comes, strict=True)
        budgets = [self.budget.of(length + 1) if new else held + 1 for length, held, new in rows]
        if not all(comes) or any(held > budget for held, budget in zip(self.held, budgets, strict=True)):
            self._keep(budgets)
        if all(held < budget for held, budget in zip(self.held, budgets, strict=True)):
            self._take(key, value, valid)
        else:
            self._overwrite(key, value, budgets)

    def _take(self, key: Tensor, value: Tensor, valid: Tensor | None) -> Tensor | None:
        batch, heads, tokens, _ = key.shape
        held, lengths = self.held or [0] * batch, self.lengths or [0] * batch
        places = self._advance(key, valid, held)
        self.held = places.after
        evicted = (torch.tensor(lengths) - torch.tensor(held)).to(key.device).unsqueeze(1)
        slots = torch.arange(tokens, device=key.device) if places.limits is None else places.limits - 1
        positions = (slots + evicted).to(torch.int32)[:, None, :, None].expand(-1, heads, -1, -1)
        for name, new in {"key": key, "value": value, "position": positions, **self._fresh(key)}.items():
            self.rows.setdefault(name, self._buffer(name)).write(new, places)
        return places.limits

    def make_room(self) -> None:
        budgets = [self.budget.of(length + 1) for length in self.lengths]
        if any(held >= budget for held, budget in zip(self.held, budgets, strict=True)):
            self._keep(budgets)

    def _keep(self, budgets: list[int]) -> None:
        """Leave room for one token of each row."""
        self._shrink([min(held, budget - 1) for held, budget in zip(self.held, budgets, strict=True)], budgets)

    def _overwrite(self, key: Tensor, value: Tensor, budgets: list[int]) -> None:
        """One token per row: in a free slot, or in place of the token of least worth."""
        new_lengths = [length + 1 for length in self.lengths]
        worth = self._worth(self._column(new_lengths), self._column(budgets))
        slot = worth.masked_fill(self._free(), torch.inf).argmin(-1)
        held = torch.tensor(self.held, device=key.device)
        room = held < torch.tensor(budgets, device=key.device)
        slot = torch.where(room.unsqueeze(1), held.unsqueeze(1), slot)
        self._advance(key, None, self.held)
        self.held = [min(held + 1, budget) for held, budget in zip(self.held, budgets, strict=True)]
        batch = torch.arange(key.shape[0], device=key.device).unsqueeze(1)
        heads = torch.arange(key.shape[1], device=key.device).unsqueeze(0)
        position = torch.tensor(self.lengths, device=key.device).to(torch.int32) - 1
        positions = position.view(-1, 1, 1, 1).expand(-1, key.shape[1], 1, 1)
        for name, new in {"key": key, "value": value, "position": positions, **self._fresh(key)}.items():
            rows = self.rows[name]
            rows.reserve(max(self.held), new)
            rows.used = max(self.held)
            assert rows.tensor is not None
            rows.tensor[batch, heads, slot] = new[:, :, 0]

    def _shrink(self, targets: list[int], budgets: list[int]) -> None:
        """Hold only the `targets[b]` tokens of most worth, in buffers of that size."""
        worth = self._worth(self._column([length + 1 for length in self.lengths]), self._column(budgets))
        kept = worth.masked_fill(self._free(), -torch.inf).topk(max(1, *targets)).indices
        for rows in self.rows.values():
            view = rows.view
            rows.replace(view.gather(2, kept.unsqueeze(-1).expand(-1, -1, -1, view.shape[-1])))
        self.held = targets

    def _occupied(self) -> int:
        return max(self.held)

    def _changed(self) -> bool:
        return self.held != self.lengths or bool(self._fresh(self.rows["key"].view))

    def _reset_books(self) -> None:
        self.held = list(self.lengths)

    def _select_books(self, rows: list[int]) -> None:
        self.held = [self.held[row] for row in rows]

    def read_mask(self) -> Tensor:
        position = self.rows["position"].view.squeeze(-1).long()
        mask = torch.zeros(*position.shape[:2], max(self.lengths), dtype=torch.int32, device=position.device)
        return mask.scatter_add_(2, position, (~self._free()).to(torch.int32).expand_as(position)) > 0

    def state(self) -> dict[str, Tensor]:
        """Tokens in order of position; free slots are zero, of position -1."""
        state = {**super().state(), "held": torch.tensor(self.held, dtype=torch.int64)}
        if not self.lengths:
            return state
        free = self._free()
        order = self.rows["position"].view.squeeze(-1).masked_fill(free, torch.iinfo(torch.int32).max).argsort(-1)
        for name, rows in self.rows.items():
            view = rows.view
            sorted_ = view.gather(2, order.unsqueeze(-1).expand(-1, -1, -1, view.shape[-1]))
            state[f"rows.{name}"] = sorted_.masked_fill(free.unsqueeze(-1), -1 if name == "position" else 0)
        return state

    def restore(self, state: dict[str, Tensor]) -> None:
        super().restore(state)
        self.held = state["held"].tolist()
        if self.lengths:
            self.rows["position"].view.clamp_(min=0)

    def _check(self, saved: Saved) -> None:
        saved.take_tokens(None)
        slots = saved.key.shape[2]
        held = saved.counts("held", saved.lengths)
        if slots < max(held) or slots > max(1, *held):
            raise KvcalError(f"rows.key: {slots} slots, the row that holds most has {max(held)} tokens")
        # Rows lose tokens only when they get one, and then hold what their budget allows.
        enough = [min(length, max(1, self.budget.of(length))) for length in saved.lengths]
        require("held", torch.tensor(held) >= torch.tensor(enough), "at least the budget of the row")
        position = saved.take("rows.position", torch.int32, *saved.key.shape[:3], 1).squeeze(-1)
        free = (torch.arange(slots) >= torch.tensor(held).unsqueeze(1)).unsqueeze(1)
        last = torch.tensor(saved.lengths).view(-1, 1, 1) - 1
        require("position", torch.where(free, position == -1, (position >= 0) & (position <= last)), "-1 where free")
        require("position", (position[..., 1:] > position[..., :-1]) | free[..., 1:], "in order")
        newest = position.amax(-1, keepdim=True) if slots else last
        require("position", newest == last, "the row's last token among those held")
        self._check_held(saved, position, held)

    def _check_held(self, saved: Saved, position: Tensor, held: list[int]) -> None:
        """Which tokens are held at these positions [B, Hkv, slots]."""

    def _attended(self, query: Tensor, logits: Logits, limits: Tensor | None) -> None:
        """T queries have attended, each to the first `limits` slots."""

    def _fresh(self, key: Tensor) -> dict[str, Tensor]:
        """What else a new token brings, [B, Hkv, T, 1] each."""
        return {}

    def _held(self) -> Tensor | None:
        """[B, 1, 1, slots] bool; None when every slot is taken."""
        return lengths_mask(self.held, self.rows["key"].view.device)

    def _free(self) -> Tensor:
        """[B, 1, slots] bool."""
        position = self.rows["position"].view
        held = torch.tensor(self.held, device=position.device).view(-1, 1, 1)
        return torch.arange(position.shape[2], device=position.device) >= held

    def _column(self, counts: list[int]) -> Tensor:
        return torch.tensor(counts, device=self.rows["key"].view.device).view(-1, 1, 1)
