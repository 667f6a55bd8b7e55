"""Timing of variants within one run, and the machine it was run on."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Timer:
    """`cpu` counts this process's own seconds: for machines that are busy with something else, on one thread."""

    clock: str = "wall"

    def seconds(self, call: Callable[[], Any]) -> float:
        now = CLOCKS[self.clock]
        start = now()
        call()
        return now() - start

    def alternate(self, variants: dict[str, Callable[[int], float]], rounds: int) -> dict[str, float]:
        """Median of the seconds that each variant returns; called with the number of the round.

        They run in turn, A B C A B C …, after one round that does not count, so that whatever else
        the machine does meets all of them alike.
        """
        found: dict[str, list[float]] = {name: [] for name in variants}
        for number in range(rounds + 1):
            for name, variant in variants.items():
                found[name].append(variant(number))
        return {name: statistics.median(seconds[1:]) for name, seconds in found.items()}


def machine() -> dict[str, Any]:
    """What timings depend on besides the code; no date, so that equal machines compare equal."""
    import sklearn
    import torch
    import transformers

    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "scikit-learn": sklearn.__version__,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor()
