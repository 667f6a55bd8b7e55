"""Measures rows in a process of its own: given as JSON, one an argument or one a line of the input, answered likewise.

A row that fails says why. Where the device answers no more after it, the row says "restart": run.py goes on
with another process.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch

from . import tree  # noqa: F401  (makes kvcal importable)
from .baselines import first_line
from .processes import MARK
from .routines import ROUTINES, Bench
from .sizes import DRY, FULL
from .timing import tidy


def answer(bench: Bench, row: Mapping[str, Any]) -> dict[str, Any]:
    """The row, with what is found of it, or why not."""
    begun = time.monotonic()
    given = {name: value for name, value in row.items() if name != "kind"}
    found: dict[str, Any] = {}
    try:
        found = ROUTINES[row["kind"]](bench, **given)
        wait(bench)
    except Exception as problem:
        found = {"failed": first_line(f"{type(problem).__name__}: {problem}")}
    try:
        use(bench)
    except Exception:  # an illegal address, or a capture that has left the process capturing
        found = {"failed": "the device answers no more", **found, "restart": True}
    return {**row, **found, "seconds": round(time.monotonic() - begun, 2)}


def wait(bench: Bench) -> None:
    """So that a kernel's fault is told of the row that launched it."""
    if bench.device.type == "cuda":
        torch.cuda.synchronize(bench.device)


def use(bench: Bench) -> None:
    """What every row needs: memory, random numbers, and an answer."""
    tidy(bench.device)
    torch.rand(1, device=bench.device)
    wait(bench)


def main(given: list[str]) -> None:
    """
    Args:
        given: "dry" or "full", then rows; without any they come from the input.
    """
    device = torch.device("cpu") if given[0] == "dry" else torch.device("cuda", 0)
    bench = Bench(DRY if given[0] == "dry" else FULL, device)
    gc.freeze()  # a capture collects garbage first: not what was imported
    for line in given[1:] or sys.stdin:
        print(MARK + json.dumps(answer(bench, json.loads(line))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
