"""Times of several routines, each measured in turn, with the caches of the processor emptied before."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

EMPTIED = 96 << 20
"""Bytes that are written before a step, more than caches hold."""
ROUNDS, FEW_ROUNDS, SLOW = 15, 3, 1.0
"""What takes longer than SLOW seconds is measured FEW_ROUNDS times."""
Routine = Callable[[], Any]


def in_turns(routines: Mapping[str, Routine]) -> dict[str, list[float]]:
    """[lower quartile, median, upper quartile] of milliseconds by name."""
    emptied, times = torch.zeros(EMPTIED // 4), {name: [] for name in routines}
    for routine in routines.values():
        routine()
    for turn in range(ROUNDS):
        for name, routine in routines.items():
            if turn >= FEW_ROUNDS and statistics.median(times[name]) > SLOW:
                continue
            emptied.add_(1)
            begin = time.perf_counter()
            routine()
            times[name].append(time.perf_counter() - begin)
    return {name: [round(1e3 * part, 4) for part in statistics.quantiles(some, n=4)] for name, some in times.items()}
