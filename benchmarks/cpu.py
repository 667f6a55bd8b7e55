"""Decoding on a CPU: attention steps of one layer, and whole steps of models, each beside the fastest that torch has.

python benchmarks/cpu.py attention                 # minutes
python benchmarks/cpu.py model --artifact FOLDER   # of smollm2-135m (docs/models.md); --model and --length for others
python benchmarks/cpu.py page                      # docs/results/cpu.md, from what was measured

Everything that is compared is measured in turns, in one run. Caches of the processor are emptied before every attention
step. `OMP_NUM_THREADS` says how many threads there are, also for numba.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent / "gpu"))
from caches import Copy, draw, fill_pages
from codebook import fitted
from measure import machine
from sizes import Sizes

from kvcal.runtime.attention import SoftmaxSpec
from kvcal.runtime.methods.full import Full
from kvcal.runtime.methods.spectral import Spectral
from kvcal.runtime.settings import new_store

RESULTS = Path(__file__).parent / "results" / "cpu.json"
PAGE = Path(__file__).parents[1] / "docs" / "results" / "cpu.md"
SHAPES = {
    "Llama-3-8B, bfloat16": Sizes(),
    "SmolLM2-135M, bfloat16": Sizes(heads=3, group=3, dims=64),
    "SmolLM2-135M, float32": Sizes(heads=3, group=3, dims=64, numbers="float32"),
}
LENGTHS = (8192, 32768, 131072)
SPECTRAL = {
    "spectral, 8-bit rows, keep .027": Spectral(rows=8, keep=0.02702),
    "spectral, its defaults": Spectral(),
}
"""Settings whose quality is in docs/results/real.md."""
EMPTIED = 96 << 20
"""Bytes that are written before a step, more than caches hold."""
ROUNDS, FEW_ROUNDS, SLOW = 15, 3, 1.0
"""What takes longer than SLOW seconds is measured FEW_ROUNDS times."""
Routine = Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("attention", "model", "page"))
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--length", type=int, action="append")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--artifact", type=Path)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--no-first", action="store_true", help="do not measure the time to the first token")
    options = parser.parse_args()
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if options.part == "attention":
        for name in options.shape or SHAPES:
            for length in options.length or LENGTHS:
                found.setdefault("attention", {}).setdefault(name, {})[str(length)] = attention(SHAPES[name], length)
                save(RESULTS, found)
    elif options.part == "model":
        if options.artifact is None:
            parser.error("--artifact: give the folder of an artifact that `calibrate pca` made of the model")
        from cpu_model import steps

        for length in options.length or (256, 7680):
            measured = steps(options.model, options.artifact, options.dtype, length, not options.no_first)
            name = f"{options.model}, {options.dtype}"
            of_model = found.setdefault("model", {}).setdefault(name, {})
            of_model[str(length)] = of_model.get(str(length), {}) | measured
            save(RESULTS, found)
    from cpu_page import write

    write(PAGE, found)


def save(path: Path, found: dict[str, Any]) -> None:
    found["machine"] = {**machine(), "numba": version("numba")}
    path.write_text(json.dumps(found, indent=1) + "\n")


@torch.no_grad()
def attention(sizes: Sizes, length: int) -> dict[str, Any]:
    """Milliseconds of an attention step by routine, and what our routines read."""
    copy = draw(sizes, 1, length, torch.device("cpu"))
    routines, read = baselines(copy, sizes), {}
    spec = SoftmaxSpec(sizes.scaling)
    for name, store in stores(copy, sizes).items():
        routines[name] = lambda store=store: store.attend(copy.query, spec)
        routines[name]()
        read[name] = store.bytes_read()
    return {"ms": in_turns(routines), "bytes_read": read}


def baselines(copy: Copy, sizes: Sizes) -> dict[str, Routine]:
    query, key, value, grouped = copy.query, copy.key, copy.value, copy.grouped

    def repeated() -> Tensor:
        many = (part.repeat_interleave(sizes.group, 1) for part in (key, value))
        return F.scaled_dot_product_attention(query, *many)

    def products() -> Tensor:
        weights = (grouped @ key.mT).float().mul_(sizes.scaling).softmax(-1)
        return weights.to(value.dtype) @ value

    return {
        "SDPA, enable_gqa": lambda: F.scaled_dot_product_attention(query, key, value, enable_gqa=True),
        "SDPA, repeated heads": repeated,
        "matmul": products,
        "SDPA, a group's queries as rows": lambda: F.scaled_dot_product_attention(grouped, key, value),
    }


def stores(copy: Copy, sizes: Sizes) -> dict[str, Any]:
    artifact = fitted(sizes, copy.basis)
    policies = {"full": Full().bind(0, sizes.dims, None)}
    policies |= {name: method.bind(0, sizes.dims, artifact) for name, method in SPECTRAL.items()}
    made = {name: new_store(policy) for name, policy in policies.items()}
    for store in made.values():
        fill_pages(store, copy.key, copy.value)
    return made


def in_turns(routines: Mapping[str, Routine]) -> dict[str, list[float]]:
    """[lower quartile, median, upper quartile] of milliseconds by name."""
    emptied, times = torch.zeros(EMPTIED // 4), {name: [] for name in routines}
    for routine in routines.values():
        routine()
    for turn in range(ROUNDS):
        for name, routine in routines.items():
            if turn >= FEW_ROUNDS and statistics.median(times[name]) > SLOW:
                continue
            emptied.add_(1)
            begin = time.perf_counter()
            routine()
            times[name].append(time.perf_counter() - begin)
    return {name: [round(1e3 * part, 4) for part in statistics.quantiles(some, n=4)] for name, some in times.items()}


if __name__ == "__main__":
    main()
