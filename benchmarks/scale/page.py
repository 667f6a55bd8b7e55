"""docs/results/scale.md."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from ..shared.lookup import load
from ..shared.page import Page
from ..shared.tables import number, table
from .calibration import PASS_TARGETS
from .projection import LLAMA_70B, RESERVOIR, assumed, projection, state_bytes

RUNS = {"demo": "demo model (4 layers, hidden 256)", "layer-7b": "one layer of a 7B shape (hidden 4096)"}


def values(results: Path) -> dict[str, Any]:
    calibration, processes, prefill = (
        load(results / "scale" / f"{name}.json") for name in ("calibration", "processes", "prefill")
    )
    shape = LLAMA_70B
    return {
        "calibration": calibration,
        "passes": passes(calibration["pass"]),
        "pca": pca(calibration["pca"]),
        "prefill": prefill,
        "prompts": prompts(prefill["ratios"]),
        "processes": processes,
        "throughput": throughput(processes["clocks"]),
        "large": state_bytes(shape["kv_heads"], shape["head_dim"], RESERVOIR, element=2),
        "shape": shape,
        "assumed": assumed(),
        "projected": projection(),
    }


PAGE = Page("scale.md", Path(__file__).with_name("page.md.j2"), values)


def passes(found: dict[str, Any]) -> str:
    rows = [
        [
            RUNS[name],
            *(number(run[ratio], ".2f") for ratio in ("pass_ratio", "whole_run_ratio_at_131072")),
            f"≤ {PASS_TARGETS[name]:.2f}",
        ]
        for name, run in found.items()
    ]
    return table(["", "each block", "with what comes once, for 131072 tokens", "target of a block"], rows)


def pca(found: dict[str, Any]) -> str:
    rows = [
        [name, number(row["seconds"], ".2f"), f"{row['eigenvalue_error']:.0e}", f"{row['subspace_angle']:.0e}"]
        for name, row in found["methods"].items()
    ]
    return table(["", "seconds", "eigenvalue error", "subspace angle"], rows)


def prompts(found: dict[str, Any]) -> str:
    """The ratios that were measured; runs before some were asked for lack these."""
    columns = list(dict.fromkeys(name for row in found.values() for name in row))
    rows = [[name, *(number(row.get(column), ".2f") for column in columns)] for name, row in found.items()]
    return table(["", *columns], rows)


def throughput(clocks: dict[str, Any]) -> str:
    rows = [
        [
            name,
            *(number(found[size], ".2f") for size in ("one", "two")),
            f"{statistics.median(found['ratios']):.2f} ({found['ratios'][0]:.2f} to {found['ratios'][-1]:.2f})",
        ]
        for name, found in (("wall", clocks["wall"]), ("CPU, of the busiest", clocks["cpu"]))
    ]
    return table(["clock", "1 process, median seconds", "2 processes", "ratio, median of the rounds (range)"], rows)
