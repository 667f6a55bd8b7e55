"""An attention step at one length and batch: our methods with their parts, everybody's dense attention, selection."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from gpu_baselines import BASELINES, COMPILED, first_line, prepare
from gpu_caches import Copy, copies
from gpu_methods import Method, dense_method, methods
from gpu_sizes import Sizes
from gpu_timing import Timer

from kvcal.kernels.select import select, select_threshold

Row = dict[str, Any]
Ceilings = Mapping[str, float | None]


def attention_rows(sizes: Sizes, length: int, batch: int, timer: Timer, ceilings: Ceilings) -> list[Row]:
    """{"length", "batch", "method", "dense": whether everything is read, "copies", then "us" and more or "failed"}."""
    held = copies(sizes, batch, length, timer.device)
    rows = []
    for name, make in methods(sizes).items():
        row = {**place(held), "method": name, "ours": True, "dense": name == "dense"}
        rows.append(row | attempt(lambda make=make: ours([make(copy) for copy in held], timer, ceilings)))  # type: ignore[misc]
    return rows + baseline_rows(sizes, held, BASELINES, timer, ceilings)


def compiled_rows(sizes: Sizes, length: int, batch: int, timer: Timer, ceilings: Ceilings) -> list[Row]:
    """As `attention_rows`, of the baselines that take long to compile."""
    held = copies(sizes, batch, length, timer.device)
    return baseline_rows(sizes, held, COMPILED, timer, ceilings)


def ours(made: list[Method], timer: Timer, ceilings: Ceilings) -> Row:
    first = made[0]
    found = moving(timer.microseconds([method.step for method in made], first.bytes), first.bytes, ceilings)
    found["parts"] = {
        name: moving(
            timer.microseconds([method.parts[name] for method in made], first.part_bytes.get(name, 0)),
            first.part_bytes.get(name),
            ceilings,
        )
        for name in first.parts
    }
    if "us" in found:
        found["rest_us"] = found["us"] - sum(part["us"] for part in found["parts"].values())
    return found


def baseline_rows(
    sizes: Sizes, held: list[Copy], baselines: Mapping[str, Callable[[Copy], Any]], timer: Timer, ceilings: Ceilings
) -> list[Row]:
    expected = dense_method(held[0], sizes).step()
    whole = held[0].key.nbytes + held[0].value.nbytes
    rows = []
    for name, make in baselines.items():
        row = {**place(held), "method": name, "ours": False, "dense": True}
        calls, why_not = prepare(make, held, expected)
        if why_not is None:
            row |= attempt(lambda calls=calls: moving(timer.microseconds(calls, whole), whole, ceilings))  # type: ignore[misc]
        else:
            row["failed"] = why_not
        rows.append(row)
        del calls
    return rows


def place(held: list[Copy]) -> Row:
    batch, _, length, _ = held[0].key.shape
    return {"length": length, "batch": batch, "copies": len(held)}


def moving(times: Mapping[str, float] | None, nbytes: int | None, ceilings: Ceilings) -> Row:
    """Times, and the share of the memory's rate at which so many bytes were moved."""
    row: Row = dict(times or {})
    if nbytes is not None:
        row["bytes"] = nbytes
        for name, ceiling in ceilings.items():
            if times and ceiling:
                row[f"of_{name}"] = nbytes / times["us"] / 1000 / ceiling
    return row


def attempt(measure: Callable[[], Row]) -> Row:
    """What it measures; or why it does not, so that the other rows still come."""
    try:
        return measure()
    except Exception as problem:
        return {"failed": first_line(f"{type(problem).__name__}: {problem}")}


def selection_row(sizes: Sizes, length: int, batch: int, timer: Timer) -> Row:
    """Of scores that lie in L2, where `score` has left them: our selections and torch.topk, which leaves no order."""
    device = timer.device
    generator = torch.Generator(device).manual_seed(0)
    draws = [torch.randn(batch, sizes.heads, length, generator=generator, device=device).half() for _ in "ab"]
    lengths = torch.full((batch,), length, dtype=torch.int32, device=device)
    keep = min(sizes.keep, length)
    thresholds = [draw.float().kthvalue(length - keep + 1).values for draw in draws]
    arrivals = torch.zeros(batch * sizes.heads, dtype=torch.int32, device=device)
    ways = {
        "select": [lambda s=scores: select(s, keep, lengths, arrivals=arrivals) for scores in draws],
        "select_threshold": [
            lambda s=scores, t=threshold: select_threshold(s, t, lengths, keep, arrivals=arrivals)
            for scores, threshold in zip(draws, thresholds, strict=True)
        ],
        "topk": [lambda s=scores: s.topk(keep, sorted=False) for scores in draws],
    }
    row: Row = {"length": length, "batch": batch, "keep": keep}
    for name, calls in ways.items():
        row[name] = attempt(lambda calls=calls: dict(timer.microseconds(calls) or {}))  # type: ignore[misc]
    return row
