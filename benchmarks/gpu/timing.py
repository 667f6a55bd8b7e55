"""Times of calls that are replayed in a CUDA graph, and what the device's memory can do.

Cold L2 by rotation: a graph runs the same step over several caches in turn, as a model's layers do, which together
are several times the L2 cache. Nothing has to be flushed and no time to be taken out, as with a flush inside the
graph: its time is several times that of a step, and what it has written is still on its way to memory meanwhile.
Queries, scores and partial results, which a step makes itself, stay in L2, as they do in a model.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

GRAPH_BYTES = 4_000_000_000
"""Read by the steps of a graph, about: a millisecond and more, beside which its own launch does not count."""
MOST_STEPS = 64
MEASURED_MS, LEAST, MOST = 40.0, 7, 25
"""Replays that are timed: for so long, and at least and at most so many."""


class Timer:
    """On a CPU it runs everything once and times nothing."""

    def __init__(self, device: torch.device):
        self.device = device

    def microseconds(self, calls: Sequence[Callable[[], Any]], moved: int = 0) -> dict[str, float] | None:
        """Of one call, in the median of the replays: {"us", "low", "high"}, the latter two quartiles.

        Args:
            calls: the same over different memory.
            moved: bytes that one of them moves, about.
        """
        if self.device.type != "cuda":
            for call in calls:
                call()
            return None
        wanted = min(MOST_STEPS, GRAPH_BYTES // max(moved, 1))
        rounds = max(1, -(-wanted // len(calls)))
        graph = captured([call for _ in range(rounds) for call in calls])
        steps = rounds * len(calls)
        first = statistics.median(self._replays(graph, 3))
        count = int(min(MOST, max(LEAST, MEASURED_MS / first)))
        low, median, high = statistics.quantiles(self._replays(graph, count), n=4)
        return {name: 1000 * ms / steps for name, ms in (("us", median), ("low", low), ("high", high))}

    def _replays(self, graph: torch.cuda.CUDAGraph, count: int) -> list[float]:
        """Milliseconds of each."""
        events = [[torch.cuda.Event(enable_timing=True) for _ in "ab"] for _ in range(count)]
        for start, end in events:
            start.record()
            graph.replay()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    def milliseconds(self, call: Callable[[], Any], repeats: int = 3) -> float | None:
        """Median time of a call that waits for the device itself and cannot be captured, after one that warms up."""
        call()
        if self.device.type != "cuda":
            return None
        found = []
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            found.append(start.elapsed_time(end))
        return statistics.median(found)


def captured(calls: Sequence[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    """A graph of these calls, one after the other; each runs before, so that nothing compiles meanwhile.

    One that fails raises, and leaves the current stream as it was.
    """
    current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):
            for call in dict.fromkeys(calls):
                call()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return graph
    finally:
        torch.cuda.set_stream(current)  # torch leaves the stream of a capture that fails current


def tidy(device: torch.device) -> None:
    """Give memory back that nothing holds any more."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


@triton.jit
def read_kernel(source, out, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * ROUNDS * BLOCK
    total = tl.zeros([BLOCK], tl.float32)
    for number in range(ROUNDS):
        total += tl.load(source + first + number * BLOCK + tl.arange(0, BLOCK))
    tl.store(out + tl.program_id(0), tl.sum(total, 0))


def ceilings(timer: Timer, nbytes: int = 4 << 30) -> dict[str, Any]:
    """GB/s of a copy, bytes read and written both counted, and of reading alone, the better of two ways."""
    device = timer.device
    if device.type != "cuda":
        nbytes = 1 << 20
    source = torch.randn(nbytes // 4, device=device)
    target = torch.empty_like(source)
    copy = timer.microseconds([lambda: target.copy_(source)], 2 * nbytes)
    found: dict[str, Any] = {
        "copy": rate(2 * nbytes, copy),
        "read": rate(nbytes, timer.microseconds([source.sum], nbytes)),
    }
    if device.type == "cuda":
        try:
            found["read"] = max(found["read"], rate(nbytes, timer.microseconds([reading(source)], nbytes)))
        except Exception as problem:
            found["note"] = f"read by torch's sum: {problem}"[:200]
    return found


def rate(nbytes: int, times: dict[str, float] | None) -> Any:
    return None if times is None else nbytes / times["us"] / 1000


def reading(source: torch.Tensor) -> Callable[[], Any]:
    """A call that reads all of it with one kernel, which is tried first."""
    rounds, block = 8, 4096
    programs = source.numel() // (rounds * block)
    out = torch.empty(programs, device=source.device)
    call = partial(read_kernel[(programs,)], source, out, ROUNDS=rounds, BLOCK=block, num_warps=8)
    call()
    difference = float((out.sum(dtype=torch.float64) - source.sum(dtype=torch.float64)).abs())
    if not difference < 1e-4 * source.nbytes**0.5:
        raise RuntimeError(f"read_kernel misses some: its sum is off by {difference:.3g}")
    return call
