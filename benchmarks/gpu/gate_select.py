"""The gate's selections: exactly those of a stable sort, with ties, and where fewer than k can be chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcal.kernels.select import select

from .gate import Gate

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
    pairs = scores.shape[:2]
    shapes = ((*pairs, slots), pairs)
    return tuple(torch.full(shape, POISON, dtype=torch.int32, device=gate.device) for shape in shapes)  # type: ignore[return-value]


def best(scores: Tensor, lengths: Tensor, k: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """(slots, ascending, 0 beyond count; count), by sorting everything."""
    index = torch.zeros(*scores.shape[:2], slots, dtype=torch.int32)
    count = torch.zeros(scores.shape[:2], dtype=torch.int32)
    order = scores.float().sort(dim=-1, descending=True, stable=True).indices.cpu()
    values = scores.float().cpu()
    for sequence in range(scores.shape[0]):
        for head in range(scores.shape[1]):
            chosen = order[sequence, head]
            chosen = chosen[chosen < int(lengths[sequence])]
            chosen = chosen[values[sequence, head, chosen] > -torch.inf][: int(k[sequence])].sort().values
            index[sequence, head, : len(chosen)], count[sequence, head] = chosen.int(), len(chosen)
    return index.to(scores.device), count.to(scores.device)


def compare(gate: Gate, name: str, out: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    gate.same(f"{name}: index", out[0], expected[0])
    gate.same(f"{name}: count", out[1], expected[1])
