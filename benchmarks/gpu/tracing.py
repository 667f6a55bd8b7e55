"""The kernels of a replayed step, their times and the gaps between them, as CUPTI saw them."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .timing import captured

ROUNDS = 2
LETTERS = 60
"""Of a kernel's name."""
Span = tuple[float, float, str]
"""Begin and end in µs, name."""


def kernels_of(steps: Sequence[Callable[[], Any]], device: torch.device) -> dict[str, Any]:
    """{"us" of a step, "launches" of a step, "kernels": by name: "n" of a step, "us", "gap" before it; medians}.

    Args:
        steps: the same over different caches. On a CPU its operations stand for kernels.
    """
    calls = [step for step in steps for _ in range(ROUNDS)]
    if device.type == "cuda":
        replay: Callable[[], Any] = captured(calls).replay
        for _ in range(5):
            replay()
        torch.cuda.synchronize()
        activity, kind = ProfilerActivity.CUDA, torch.autograd.DeviceType.CUDA
    else:
        replay, activity, kind = calls[0], ProfilerActivity.CPU, torch.autograd.DeviceType.CPU
        calls = calls[:1]
    with profile(activities=[activity]) as seen:
        replay()
        if device.type == "cuda":
            torch.cuda.synchronize()
    events = [event for event in seen.events() if event.device_type == kind]
    return table([(event.time_range.start, event.time_range.end, event.name) for event in events], len(calls))


def table(spans: Sequence[Span], steps: int) -> dict[str, Any]:
    spans = sorted(spans)
    if not spans:
        return {"failed": "the profiler saw no kernels"}
    times, gaps = defaultdict(list), defaultdict(list)
    before = spans[0][0]
    for start, end, name in spans:
        times[name[:LETTERS]].append(end - start)
        gaps[name[:LETTERS]].append(start - before)
        before = end
    kernels = {
        name: {"n": len(found) / steps, "us": statistics.median(found), "gap": statistics.median(gaps[name])}
        for name, found in times.items()
    }
    return {"us": (spans[-1][1] - spans[0][0]) / steps, "launches": len(spans) / steps, "kernels": kernels}
