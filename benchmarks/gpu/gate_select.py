"""The gate's selections: exactly those of a stable sort, with ties, rows that have too few, and thresholds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from gate import Gate
from torch import Tensor

from kvcal.kernels.select import select, select_runs, select_threshold

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
        for form, rank in (("within", k // 2), ("over", 2 * k)):
            rank = min(rank, capacity // 2)
            mine = scores.float().where(torch.arange(capacity, device=gate.device) < lengths.view(-1, 1, 1), -torch.inf)
            threshold = mine.sort(-1, descending=True).values[..., rank].contiguous()
            reached = scores.where(scores.float() >= threshold.unsqueeze(-1), -torch.inf)
            out = poisoned(gate, scores, k)
            select_threshold(scores, threshold, lengths, k, out=out, backend=gate.backend)
            expected = best(reached, lengths, gate.integers(k, k, k), k)
            compare(gate, f"select_threshold {name} {form} of {capacity}", out, expected)


def check_select_runs(gate: Gate) -> None:
    sizes = gate.sizes
    most = sizes.gate_long // sizes.per_cluster[-1]
    for name, dtype, clusters, grain in (
        ("float32", torch.float32, sizes.gate_long // sizes.per_cluster[0], 0.0),
        ("many ties", torch.float32, most, 0.5),
        ("long, float16", torch.float16, 2 * most + 3, 0.0),
    ):
        counts, room = gate.integers(clusters, clusters // 2, 1), gate.integers(sizes.keep, 8 * clusters, 0)
        scores = gate.normal(3, sizes.heads, clusters, dtype=torch.float32)
        scores = ((scores / grain).round() * grain if grain else scores).to(dtype)
        scores[:, :, ::7] = -torch.inf
        scores[1, :, clusters // 2 :] = torch.inf  # beyond the count
        size = torch.randint(0, 33, scores.shape, generator=gate.generator, device=gate.device, dtype=torch.int32)
        starts = (size.cumsum(-1) - size).int()
        leading = gate.integers(0, 5, 9).view(3, 1), gate.integers(4, 0, 7).view(3, 1)
        rows = scores.shape[:2]
        slots = min(clusters, sizes.keep)
        out = tuple(
            torch.full((*rows, *width), POISON, dtype=torch.int32, device=gate.device)
            for width in ((1 + slots,), (1 + slots,), ())
        )
        unread = torch.full(scores.shape, torch.nan, device=gate.device)
        select_runs(
            scores, starts, size, room, counts,
            leading=leading, capacity_out=slots, out=out, unread=unread, backend=gate.backend,
        )  # fmt: skip
        expected = runs_of(scores, starts, size, room, counts, leading, slots)
        for what, mine, theirs in zip(("starts", "sizes", "count", "unread"), (*out, unread), expected, strict=True):
            gate.same(f"select_runs {name} of {clusters}: {what}", mine, theirs)


def runs_of(
    scores: Tensor,
    starts: Tensor,
    size: Tensor,
    room: Tensor,
    counts: Tensor,
    leading: Sequence[Tensor],
    slots: int,
) -> list[Tensor]:
    """(starts, sizes, count, unread), cluster after cluster in the order of a sort."""
    rows = scores.shape[:2]
    result = [torch.zeros(*rows, *width, dtype=torch.int32) for width in ((1 + slots,), (1 + slots,), ())]
    unread = torch.zeros(scores.shape)
    for row in range(rows[0]):
        number = int(counts[row])
        for head in range(rows[1]):
            score, start, tokens = (of[row, head].tolist() for of in (scores, starts, size))
            taken: dict[int, int] = {}
            left = int(room[row])
            for at in sorted(range(number), key=lambda at: (-score[at], at)):
                if left and tokens[at] and score[at] > -torch.inf and len(taken) < slots:
                    taken[at] = min(tokens[at], left)
                    left -= taken[at]
            chosen = sorted(taken)
            listed = [int(of[row]) for of in leading], [[start[at] for at in chosen], [taken[at] for at in chosen]]
            for of, first, rest in zip(result, *listed, strict=False):
                of[row, head, : 1 + len(rest)] = torch.tensor([first, *rest])
            result[2][row, head] = 1 + len(chosen)
            unread[row, head, :number] = torch.tensor([tokens[at] - taken.get(at, 0) for at in range(number)]).float()
    return [of.to(scores.device) for of in (*result, unread)]


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
