"""Tools that watch a process: hardware counters by ncu, bad accesses by compute-sanitizer. A missing one is noted."""

from __future__ import annotations

import csv
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .expected import step
from .sizes import Sizes

PLACES = ("usr/local/cuda*/bin", "opt/nvidia/nsight-compute/*")
"""Beside the path."""
KERNELS = "append|dense|merge|rows|score|select"
SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "WarpStateStats", "MemoryWorkloadAnalysis")
METRICS = (
    "Duration",
    "DRAM Throughput",
    "L2 Cache Throughput",
    "Compute (SM) Throughput",
    "Achieved Occupancy",
    "Registers Per Thread",
    "Local Memory Spilling Requests",
    "No Eligible",
)
"""Of ncu, kept in the row; all others are in its file."""


def find(tool: str) -> str | None:
    places = (path for place in PLACES for path in sorted(Path("/").glob(f"{place}/{tool}")))
    return shutil.which(tool) or next(map(str, places), None)


def watched(row: Mapping[str, Any], sizes: Sizes, out: Path) -> tuple[str, list[str], dict[str, Any]] | None:
    """(the tool, its arguments, the row that is measured under it); None: a row that needs no tool."""
    if row["kind"] == "sanitizer":
        arguments = ["--tool", "memcheck", "--error-exitcode", "9"]
        return "compute-sanitizer", arguments, {"kind": "check", "check": row["check"], "small": True}
    if row["kind"] != "counters":
        return None
    measured = {**row, "kind": "eager"}
    launches = step(sizes, row["method"], row["length"], row["batch"]).kernels  # of the last of three steps
    chosen = ["-k", f"regex:^({KERNELS})_kernel$", "--launch-skip", str(2 * launches), "-c", str(launches)]
    sections = [part for section in SECTIONS for part in ("--section", section)]
    log = ["--csv", "--log-file", str(counters_file(row, out))]
    return "ncu", ["--clock-control", "none", *sections, *log, *chosen], measured


def counters_file(row: Mapping[str, Any], out: Path) -> Path:
    method = "".join(letter for letter in row["method"] if letter.isalnum())
    return out / f"ncu-{method}-{row['batch']}.csv"


def seen(row: Mapping[str, Any], out: Path, code: int | None, said: Sequence[str]) -> dict[str, Any]:
    """What the tool found, after its process has ended with `code`."""
    if row["kind"] == "sanitizer":
        told = next((line for line in reversed(said) if "ERROR SUMMARY" in line), "no summary")
        return {"passed": code == 0 and "0 errors" in told, "note": told.lstrip("= ")}
    path = counters_file(row, out)
    if not path.exists():
        return {"failed": f"ncu wrote nothing; it ended with {code}: {said[-1] if said else 'nothing said'}"}
    found = counters(path.read_text(errors="replace"))
    return {"file": path.name, "counters": found} if found else {"file": path.name, "failed": "no kernel in its file"}


def counters(text: str) -> list[dict[str, Any]]:
    """[{"kernel", and of METRICS those that it has, with their units}], in the order of launches."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    kernels: dict[str, dict[str, Any]] = {}
    for record in csv.DictReader(lines):
        kernel = kernels.setdefault(record["ID"], {"kernel": record["Kernel Name"]})
        if record.get("Metric Name") in METRICS:
            kernel[record["Metric Name"]] = f"{record['Metric Value']} {record['Metric Unit']}".strip()
    return list(kernels.values())


def said_by(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def card() -> dict[str, str]:
    """{"driver", "state": clocks, power and temperature now}, as far as nvidia-smi tells."""
    asked = "driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu"
    told = said_by(["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader", "--id=0"])
    if told is None:
        return {"driver": "unknown, no nvidia-smi", "state": "unknown"}
    driver, _, state = told.partition(", ")
    return {"driver": driver, "state": state}


def commit(folder: Path) -> str | None:
    """With a plus sign where files differ from it; None where there is no repository."""
    git = ["git", "-C", str(folder)]
    head = said_by([*git, "rev-parse", "HEAD"])
    return f"{head}+" if head and said_by([*git, "status", "--porcelain", "--untracked-files=no"]) else head
