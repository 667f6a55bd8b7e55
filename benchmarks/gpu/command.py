"""The command line of a run: the folder of its results, and how long it may take."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from . import first, second, tools, tree
from .run import DRY_TIMES, Phase, Run
from .sizes import Sizes

WORKER = (sys.executable, "-m", "benchmarks.gpu.worker")
RUNS: dict[str, tuple[float, Callable[[Sizes], Sequence[Phase]]]] = {
    "first": (6, first.phases),
    "second": (5, second.phases),
}
"""Minutes that each may take, and what it measures."""


def main(about: str | None, arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", choices=RUNS)
    parser.add_argument("out", type=Path, help="folder of the results, made where there is none")
    parser.add_argument("--minutes", type=float, help="of all together; what does not fit is skipped")
    parser.add_argument("--dry", action="store_true", help="on a CPU, tiny shapes, no times")
    parser.add_argument("--commit", help="of this code, where git cannot tell")
    options = parser.parse_args(arguments)
    name = options.run
    minutes, phases = RUNS[name]
    minutes = options.minutes or minutes
    if (options.out / f"{name}.json").exists():
        print(f"error: {options.out} holds results of this run already: give another folder", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    seconds = 60 * minutes * (DRY_TIMES if options.dry else 1)
    described = {"commit": options.commit or tools.commit(tree.ROOT), "dry": options.dry, "minutes": minutes}
    run = Run(name, options.out, options.dry, seconds, WORKER, described)
    try:
        return measured(run, phases(run.sizes))
    finally:
        run.close()


def measured(run: Run, phases: Sequence[Phase]) -> int:
    """0: all that was checked is right, and no row of ours failed."""
    machine = run.alone({"kind": "machine"}, 90)
    if "failed" in machine:
        print(f"error: no GPU that works: {machine['failed']}; --dry runs the same, tiny, on a CPU", file=sys.stderr)
        return 2
    run.put({**machine, **tools.card()})
    run.go(phases)
    run.results["state_after"] = tools.card()["state"]
    run.save()
    wrong = [row for row in run.rows if row.get("passed") is False or ("failed" in row and row["kind"] != "baseline")]
    skipped = sum("skipped" in row for row in run.rows)
    run.say(f"{len(run.rows)} rows, {skipped} skipped, {len(wrong)} failed, in {run.results['seconds']:.0f} s")
    return 1 if wrong else 0
