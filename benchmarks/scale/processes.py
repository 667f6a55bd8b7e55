"""What calibration costs when it is scaled: several processes, and bytes of state.

Throughput is a ratio of runs that alternate within this one, one thread per process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kvcal.artifacts import load
from kvcal.calibrate.statistics import StatisticsFitter

from ..shared.measure import machine
from ..shared.places import RESULTS
from .projection import state_bytes

SEQ_LEN, RESERVOIR = 512, 4096
CHILD = """
import os, sys, time
from kvcal.calibrate import pass_loop
run = pass_loop.PassLoop.run
def timed(self, *rest):
    self._world.exchange("start")
    wall, cpu = time.perf_counter(), time.process_time()
    found = run(self, *rest)
    cpu = time.process_time() - cpu
    slowest = max(self._world.exchange(cpu))
    if self._world.first:
        open(os.environ["SECONDS_FILE"], "w").write(f"{time.perf_counter() - wall} {slowest}")
    return found
pass_loop.PassLoop.run = timed
from kvcal.calibrate.__main__ import main
main()
"""


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "child.py").write_text(CHILD)
        seconds: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
        for number in range(options.rounds + 1):
            for size, found in seconds.items():
                found.append(run(place, f"{size}-{number}", size, options.blocks))
                print(
                    f"round {number}: {size} process(es) {found[-1][0]:.2f} s wall, {found[-1][1]:.2f} s CPU",
                    flush=True,
                )
        measured = {
            "rounds": options.rounds,
            "blocks": options.blocks,
            "seq_len": SEQ_LEN,
            "clocks": {clock: compare(seconds, index) for index, clock in enumerate(("wall", "cpu"))},
            "state": measure_state(place / "1-0"),
            "machine": machine(),
        }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(measured, indent=1) + "\n")
    print(options.output)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale processes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--output", type=Path, default=RESULTS / "scale" / "processes.json")
    return parser.parse_args(arguments)


def compare(seconds: dict[int, list[tuple[float, float]]], clock: int) -> dict[str, Any]:
    """Medians by one of the clocks, and the ratios of one process to two of each round, ascending."""
    one, two = ([each[clock] for each in seconds[size][1:]] for size in (1, 2))
    ratios = sorted(a / b for a, b in zip(one, two, strict=True))
    return {"one": statistics.median(one), "two": statistics.median(two), "ratios": ratios}


def run(place: Path, name: str, size: int, blocks: int) -> tuple[float, float]:
    """Seconds of the pass itself: on the wall, from when all processes are ready until the last has done its share;
    and of CPU time, of the process that used most."""
    launcher = [sys.executable]
    if size > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(size)]
    words = ["pca", "--model", "demo", "--data", "stdlib", "--device", "cpu", "--output", str(place / name)]
    words += ["--num-tokens", str(blocks * SEQ_LEN), "--seq-len", str(SEQ_LEN), "--reservoir", str(RESERVOIR)]
    words += ["--checkpoint-every", "100000"]
    result = place / "seconds"
    done = subprocess.run(
        [*launcher, str(place / "child.py"), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "SECONDS_FILE": str(result)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{size} processes failed:\n{done.stderr[-2000:]}")
    wall, cpu = map(float, result.read_text().split())
    return wall, cpu


def measure_state(folder: Path) -> dict[str, Any]:
    """Bytes of the tensors that a layer's statistics hold, counted and by the formula."""
    layer = load(folder).layers[0]
    fitter = StatisticsFitter(RESERVOIR)
    fitter.add_layer(layer, torch.float32)
    counted = sum(tensor.nbytes for name, tensor in fitter.state()[1].items() if name != "token")
    formula = state_bytes(layer.kv_heads, layer.head_dim, RESERVOIR, element=4)
    return {"kv_heads": layer.kv_heads, "head_dim": layer.head_dim, "reservoir": RESERVOIR, "bytes": counted} | formula
