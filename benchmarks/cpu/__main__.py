"""Decoding on a CPU: attention steps of one layer, and whole steps of models, each beside the fastest that torch has.

    python -m benchmarks.cpu attention                 # minutes
    python -m benchmarks.cpu model --artifact FOLDER   # of smollm2-135m (docs/models.md); --model, --length for others

Everything that is compared is measured in turns, in one run. Caches of the processor are emptied before every attention
step. `OMP_NUM_THREADS` says how many threads there are, also for numba.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kvcal.artifacts import KvcalError

from ..shared.measure import machine
from ..shared.places import RESULTS
from .attention import LENGTHS, SHAPES, attention
from .model import steps


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("attention", "model"))
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--length", type=int, action="append")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--artifact", type=Path)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--no-first", action="store_true", help="do not measure the time to the first token")
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu" / "decoding.json")
    options = parser.parse_args()
    found = json.loads(options.output.read_text()) if options.output.exists() else {}
    if options.part == "attention":
        for name in options.shape or SHAPES:
            for length in options.length or LENGTHS:
                found.setdefault("attention", {}).setdefault(name, {})[str(length)] = attention(SHAPES[name], length)
                save(options.output, found)
        return
    if options.artifact is None:
        parser.error("--artifact: give the folder of an artifact that `calibrate pca` made of the model")
    for length in options.length or (256, 7680):
        measured = steps(options.model, options.artifact, options.dtype, length, not options.no_first)
        name = f"{options.model}, {options.dtype}"
        of_model = found.setdefault("model", {}).setdefault(name, {})
        of_model[str(length)] = of_model.get(str(length), {}) | measured
        save(options.output, found)


def save(path: Path, found: dict[str, Any]) -> None:
    found["machine"] = {**machine(), "numba": version("numba")}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except KvcalError as error:
        sys.exit(f"error: {error}")
