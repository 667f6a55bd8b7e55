"""What calibration costs on a CPU: time over a plain forward pass, memory over tokens, PCA over scikit-learn's.

All figures are ratios between variants that alternate within this run.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvcal.calibrate import calibrate, save

from ..shared.measure import CLOCKS, Timer, machine
from ..shared.places import RESULTS
from .pass_time import TERMS, USUAL_TOKENS, layer_7b_run, measure_pass, text_run
from .streaming_pca import measure_pca

PASS_TARGETS = {"demo": 1.30, "layer-7b": 1.10}
MEMORY_TARGET = 1.05
MEMORY_SEQ_LEN, MEMORY_BLOCKS, MEMORY_RESERVOIR = 512, (16, 160), 2048


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    if options.peak_of:  # a child of `measure_memory`
        print(json.dumps(peak_of_run(options.model, options.peak_of)))
        return
    timer, quick = Timer(options.clock), options.quick
    result: dict[str, Any] = {"machine": machine(), "clock": options.clock, "quick": quick, "terms": TERMS, "pass": {}}

    demo = text_run(options.model, *((2, 512) if quick else (8, 2048)))
    result["pass"]["demo"] = measure_pass(*demo, 3 if quick else 20, timer)
    print_pass("demo", result["pass"]["demo"])
    large = layer_7b_run(*((2, 128) if quick else (4, 512)))
    result["pass"]["layer-7b"] = measure_pass(*large, 3 if quick else 10, timer)
    print_pass("layer-7b", result["pass"]["layer-7b"])

    result["memory"] = measure_memory(options.model)
    print_memory(result["memory"])
    result["pca"] = measure_pca(timer, rounds=1 if quick else 5)
    print_pca(result["pca"])

    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\n{options.output}")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale calibration",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "scale" / "calibration.json")
    parser.add_argument("--model", default="demo", help="model of the demo and memory runs  [default: demo]")
    parser.add_argument("--quick", action="store_true", help="few repetitions of short blocks: a smoke test")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: for a busy machine, with one thread")
    parser.add_argument("--peak-of", type=int, metavar="BLOCKS", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def measure_memory(model: str) -> dict[str, Any]:
    """Peaks of two runs, each in a process of its own; the reservoir is full in both."""
    command = [sys.executable, "-m", "benchmarks.scale", "calibration", "--model", model, "--peak-of"]
    runs = [json.loads(subprocess.check_output([*command, str(blocks)], text=True)) for blocks in MEMORY_BLOCKS]
    return {
        "tokens": [blocks * MEMORY_SEQ_LEN for blocks in MEMORY_BLOCKS],
        "reservoir": MEMORY_RESERVOIR,
        "peak_bytes": [run["peak"] for run in runs],
        "peak_bytes_before_the_pass": [run["before"] for run in runs],
        "ratio": runs[1]["peak"] / runs[0]["peak"],
    }


def peak_of_run(model_spec: str, count: int) -> dict[str, int]:
    model, blocks = text_run(model_spec, count, MEMORY_SEQ_LEN)
    before = peak_memory()
    with tempfile.TemporaryDirectory() as folder:
        save(calibrate(model, blocks, reservoir=MEMORY_RESERVOIR), Path(folder) / "artifact")
    return {"before": before, "peak": peak_memory()}


def peak_memory() -> int:
    """Bytes that this process has held at most.

    Not ru_maxrss where there is /proc: on Linux a child starts with its parent's, and the ratio would always be 1.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def print_pass(name: str, found: dict[str, Any]) -> None:
    parts = found["per_block_seconds"]
    print(f"\n{name}, {found['blocks']} blocks of {found['seq_len']} tokens, pre and post rotary")
    print("  each block               seconds    of forward")
    for part, seconds in parts.items():
        print(f"    {part:<20} {seconds:9.4f}  {seconds / parts['forward']:12.1%}")
    print(f"  once                     seconds    of forward over {USUAL_TOKENS} tokens")
    for part, seconds in found["once_seconds"].items():
        share = seconds / parts["forward"] * found["seq_len"] / USUAL_TOKENS
        print(f"    {part:<20} {seconds:9.4f}  {share:12.2%}")
    target = PASS_TARGETS[name]
    print(f"  calibration / forward: {found['pass_ratio']:.3f} for each block (target {target:.2f})")
    print(
        f"    {found['whole_run_ratio_at_131072']:.3f} with what comes once, for {USUAL_TOKENS} tokens; "
        f"{found['whole_run_ratio']:.3f} for these {found['blocks'] * found['seq_len']}"
    )


def print_memory(found: dict[str, Any]) -> None:
    print(f"\npeak memory (target {MEMORY_TARGET:.2f})")
    for tokens, peak in zip(found["tokens"], found["peak_bytes"], strict=True):
        print(f"    {tokens:>6} tokens {peak / 1e6:12.1f} MB")
    print(f"  ten times the tokens / once: {found['ratio']:.3f}")


def print_pca(found: dict[str, Any]) -> None:
    print(
        f"\nPCA of {found['heads']} heads x {found['tokens']} keys x {found['head_dim']} dims, against all keys at once"
    )
    print("                           seconds  eigenvalue error  subspace angle")
    for name, row in found["methods"].items():
        print(f"    {name:<20} {row['seconds']:9.4f}  {row['eigenvalue_error']:16.1e}  {row['subspace_angle']:14.1e}")
    for name, ratio in found["time_ratio"].items():
        print(f"  kvcal / {name}: {ratio:.3f}")
