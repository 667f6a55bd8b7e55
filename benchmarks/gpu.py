"""Kernels, attention steps and whole decode steps on one GPU; first whether they are right.

    python benchmarks/gpu.py [--minutes 8] [--out benchmarks/results]      # under nine minutes on an H100 or H200
    python benchmarks/gpu.py --page benchmarks/results/nvidia-h200.json    # docs/results/gpu.md and gpu.png of it
    python benchmarks/gpu.py --dry                                         # all of it on a CPU, tiny; writes nothing

Exits with 1, and without timings, when a kernel is wrong. What time does not suffice for is skipped by name.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_attention import attempt, attention_rows, compiled_rows, selection_row
from gpu_build import build_row
from gpu_gate import Gate, check_append, check_cluster, check_score
from gpu_gate_attention import check_attend, check_dense, check_runs, check_steps, check_tail, check_unread
from gpu_gate_select import check_select, check_select_runs
from gpu_gate_spectral import check_chosen_slots, check_offset, check_remainder, check_score_runs
from gpu_model import build_model, model_rows
from gpu_results import PAGES, RESULTS, brief, commit, machine, save
from gpu_sizes import DRY, FULL, Sizes
from gpu_spectral import FORMS
from gpu_timing import Timer, ceilings, tidy

from kvcal.kernels.backend import interpreting

CHECKS = (
    check_append,
    check_score,
    check_select,
    check_select_runs,
    check_cluster,
    check_dense,
    check_attend,
    check_runs,
    check_tail,
    check_unread,
    check_offset,
    check_score_runs,
    check_chosen_slots,
    check_remainder,
    check_steps,
)
Results = dict[str, Any]
Task = tuple[str, float, Callable[[], None]]
"""Name, seconds that it may take, what it does."""


def main(arguments: Sequence[str] | None = None, pages: Path = PAGES) -> int:
    """Args: pages: folder of what `--page` writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="of all together; what does not fit is skipped")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON")
    parser.add_argument("--commit", help="of this code, where git cannot tell")
    parser.add_argument("--dry", action="store_true", help="on a CPU, tiny shapes, no timings, no files")
    parser.add_argument(
        "--page", type=Path, nargs="+", metavar="JSON", help="only write docs/results/gpu.md and gpu.png"
    )
    options = parser.parse_args(arguments)
    if options.page:
        from gpu_page import write

        write([json.loads(path.read_text()) for path in options.page], pages)
        return 0
    if not options.dry and not torch.cuda.is_available():
        print("error: no GPU here; --dry runs the same, tiny, on a CPU", file=sys.stderr)
        return 2
    started = time.monotonic()
    device, sizes = (torch.device("cpu"), DRY) if options.dry else (torch.device("cuda", 0), FULL)
    results: Results = {"machine": machine(device), "commit": options.commit or commit(), "minutes": options.minutes}
    results["gate"] = gated(sizes, device, "triton" if not options.dry or interpreting() else "reference")
    if not all(check["passed"] for check in results["gate"]):
        return 1
    timer = Timer(device)
    results["ceilings"] = ceilings(timer)
    print(f"ceilings, GB/s: {results['ceilings']}", flush=True)
    results["skipped"] = []
    for name, needed, task in tasks(results, sizes, timer):
        begun = time.monotonic() - started
        if begun + needed > 60 * options.minutes:
            results["skipped"].append(name)
            print(f"skipped, no time left: {name}", flush=True)
            continue
        failed = attempt(lambda task=task: task() or {}).get("failed")  # type: ignore[misc]
        if failed:
            results["skipped"].append(f"{name}: {failed}")
        tidy(device)
        results["seconds"] = time.monotonic() - started
        took = f"{results['seconds']:6.1f} s, {results['seconds'] - begun:5.1f} of it for {name}"
        print(f"{took}: {failed}" if failed else took, flush=True)
        if not options.dry:
            save(results, options.out)
    return 0


def gated(sizes: Sizes, device: torch.device, backend: str) -> list[dict[str, Any]]:
    """What the gate has found, printed."""
    gate = Gate(sizes, device, backend)
    gate.run(*CHECKS)
    for check in gate.checks:
        verdict, error = "right" if check["passed"] else "WRONG", check["error"]
        print(
            f"{verdict} {'–' if error is None else format(error, '.2g'):>8} of {check['allowed']:<8.2g}{check['check']}"
        )
    print(f"gate: {sum(check['passed'] for check in gate.checks)} of {len(gate.checks)} on {backend}", flush=True)
    tidy(device)
    return gate.checks


def tasks(results: Results, sizes: Sizes, timer: Timer) -> list[Task]:
    """What is measured, the most telling first; every task adds rows to `results`."""
    for section in ("attention", "selection", "model", "build"):
        results[section] = []
    made: list[Any] = []
    longest, *others = sizes.lengths
    middle = others[0]
    spectral = tuple(f"spectral {form}" for form in FORMS)
    clusterkv = tuple(f"clusterkv {per_cluster}" for per_cluster in sizes.per_cluster)

    def model() -> Any:
        if not made:
            made.append(build_model(sizes, timer.device))
        return made[0]

    def attention(length: int, batch: int, measure: Any = attention_rows) -> Task:
        what, needed = ("flex attention", 45) if measure is compiled_rows else ("attention", 25)
        rows = lambda: add("attention", measure(sizes, length, batch, timer, results["ceilings"]))  # noqa: E731
        return f"{what} of {length} tokens, batch {batch}", needed, rows

    def selection(length: int, batch: int) -> Task:
        row = lambda: add("selection", [selection_row(sizes, length, batch, timer)])  # noqa: E731
        return f"selection of {length} tokens, batch {batch}", 10, row

    def whole(length: int, batch: int | None, names: tuple[str, ...]) -> Task:
        name = f"model at {length} tokens, {'as many rows as fit' if batch is None else f'batch {batch}'}"
        return name, 35, lambda: add("model", model_rows(model(), sizes, length, batch, names))

    def build(length: int, calibrated: bool) -> Task:
        name = f"clusters of {length} tokens{', calibrated' if calibrated else ''}"
        row = lambda: add("build", [build_row(sizes, length, sizes.per_cluster[0], calibrated, timer)])  # noqa: E731
        return name, 20, row

    def add(section: str, rows: list[Any]) -> None:
        results[section] += rows
        for row in rows:
            print("   ", brief(row), flush=True)

    return [
        *(attention(longest, batch) for batch in sizes.batches),
        *(selection(longest, batch) for batch in sizes.batches),
        *(attention(middle, batch) for batch in sizes.batches),
        *(build(length, calibrated) for length in (middle, longest) for calibrated in (False, True)),
        whole(longest, 1, ("full", "loki", *clusterkv, *spectral)),
        whole(longest, None, ("full", "loki", *clusterkv, *spectral)),
        whole(middle, 1, ("full", "loki", clusterkv[0], spectral[-1])),
        whole(middle, None, ("full", "loki", clusterkv[0], spectral[-1])),
        ("giving the model back", 0, made.clear),
        *(attention(length, batch) for length in others[1:] for batch in sizes.batches),
        *(selection(length, batch) for length in others for batch in sizes.batches),
        *(attention(longest, batch, compiled_rows) for batch in sizes.batches),
    ]


if __name__ == "__main__":
    sys.exit(main())
