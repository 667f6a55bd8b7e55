"""The gate's selections: exactly those of a stable sort, with ties and rows that have too few."""

from __future__ import annotations

import torch
from gate import Gate
from torch import Tensor

from kvcal.kernels.select import select

POISON = -7


def check_select(gate: Gate) -> None:
    sizes, k = gate.sizes, min(gate.sizes.keep, gate.sizes.gate // 2)
    for name, dtype, capacity, grain in (
        ("float16", torch.float16, sizes.gate_long, 0.0),
        ("many ties", torch.float16, sizes.gate, 0.5),
        ("float32", torch.float32, sizes.gate + 3, 0.0),
        ("short", torch.float16, sizes.gate // 8, 0.0),
    ):
        second = min(capacity, capacity // 2 + 13)
        lengths = gate.integers(capacity, second, 1)
        scores = gate.normal(3, sizes.heads, capacity, dtype=torch.float32)
        scores = ((scores / grain).round() * grain if grain else scores).to(dtype)
        scores[:, :, ::7] = -torch.inf
        scores[1, :, second:] = torch.inf  # beyond the length
        budgets = gate.integers(k, 5, k)
        for form, budget in ((f"k {k}", gate.integers(k, k, k)), ("k by row", budgets)):
            out = poisoned(gate, scores, k)
            given = k if form != "k by row" else budget
            select(scores, given, lengths, capacity_out=k, out=out, backend=gate.backend)
            compare(gate, f"select {name} {form} of {capacity}", out, best(scores, lengths, budget, k))


def poisoned(gate: Gate, scores: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    rows = scores.shape[:2]
    return tuple(torch.full(shape, POISON, dtype=torch.int32, device=gate.device) for shape in ((*rows, slots), rows))  # type: ignore[return-value]


def best(scores: Tensor, lengths: Tensor, k: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """(slots, ascending, 0 beyond count; count), by sorting everything."""
    index = torch.zeros(*scores.shape[:2], slots, dtype=torch.int32)
    count = torch.zeros(scores.shape[:2], dtype=torch.int32)
    order = scores.float().sort(dim=-1, descending=True, stable=True).indices.cpu()
    values = scores.float().cpu()
    for row in range(scores.shape[0]):
        for head in range(scores.shape[1]):
            mine = order[row, head]
            mine = mine[mine < int(lengths[row])]
            mine = mine[values[row, head, mine] > -torch.inf][: int(k[row])].sort().values
            index[row, head, : len(mine)], count[row, head] = mine.int(), len(mine)
    return index.to(scores.device), count.to(scores.device)


def compare(gate: Gate, name: str, out: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    gate.same(f"{name}: index", out[0], expected[0])
    gate.same(f"{name}: count", out[1], expected[1])
