"""What can be measured, by kind: each takes a row's parameters and gives what it finds. run.py decides when."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import triton
from torch import Tensor

from kvcal.kernels.backend import interpreting
from kvcal.kernels.select import select

from .attention_steps import methods
from .baselines import BASELINES, COMPILED, prepare, softmax_in_float32
from .build import build_row
from .caches import Copy, copies, draw
from .checks import checked
from .expected import parts, step
from .gate import Gate
from .model import build_model, fitting, step_time
from .sizes import DRY, Sizes
from .timing import Timer, ceilings, tidy
from .tracing import kernels_of

Found = dict[str, Any]


@dataclass
class Bench:
    """What rows share: caches of one shape, or the model, since both fill the memory."""

    sizes: Sizes
    device: torch.device

    def __post_init__(self) -> None:
        self.timer = Timer(self.device)
        self._shape: tuple[int, int] | None = None
        self._held: list[Copy] = []

    @property
    def backend(self) -> str:
        return "triton" if self.device.type == "cuda" or interpreting() else "reference"

    def held(self, length: int, batch: int) -> list[Copy]:
        if self._shape != (length, batch):
            self.drop(model=True)
            self._held, self._shape = copies(self.sizes, batch, length, self.device), (length, batch)
        return self._held

    @cached_property
    def model(self) -> Any:
        return build_model(self.sizes, self.device)

    def drop(self, model: bool = False) -> None:
        """Give back what other rows needed.

        Args:
            model: that, too.
        """
        self._shape, self._held = None, []
        if model:
            vars(self).pop("model", None)
        tidy(self.device)


def machine(bench: Bench) -> Found:
    """What times depend on besides the code."""
    import transformers

    found: Found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
    }
    if bench.device.type == "cuda":
        properties = torch.cuda.get_device_properties(bench.device)
        found |= {
            "gpu": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "l2_mib": getattr(properties, "L2_cache_size", 0) / 2**20,
            "cuda": torch.version.cuda,
        }
    return found


def check(bench: Bench, check: str, small: bool = False) -> Found:
    """
    Args:
        small: at the shapes of `--dry`.
    """
    return checked(Gate(DRY if small else bench.sizes, bench.device, bench.backend), check)


def measure_ceilings(bench: Bench) -> Found:
    return ceilings(bench.timer)


def measure_step(bench: Bench, method: str, length: int, batch: int) -> Found:
    """One method's attention step of one layer, as `runtime.decode` captures it."""
    held, make = bench.held(length, batch), methods(bench.sizes)[method]
    made = [make(copy).step for copy in held]
    moved = step(bench.sizes, method, length, batch).bytes
    return {"copies": len(held), **(bench.timer.microseconds(made, int(moved)) or {})}


def measure_parts(bench: Bench, method: str, length: int, batch: int) -> Found:
    """Each part of the step alone."""
    made = [methods(bench.sizes)[method](copy).parts for copy in bench.held(length, batch)]
    works = parts(bench.sizes, method, length, batch)
    found = {
        name: bench.timer.microseconds([each[name] for each in made], int(works[name].bytes)) or {} for name in made[0]
    }
    return {"copies": len(made), "parts": found}


def measure_baseline(bench: Bench, method: str, length: int, batch: int) -> Found:
    """Dense attention by somebody else."""
    held = bench.held(length, batch)
    expected = softmax_in_float32(held[0], bench.sizes.scaling)
    calls, why_not = prepare((BASELINES | COMPILED)[method], held, expected)
    if why_not is not None:
        return {"copies": len(held), "failed": why_not}
    moved = held[0].key.nbytes + held[0].value.nbytes
    return {"copies": len(held), **(bench.timer.microseconds(calls, moved) or {})}


def measure_selection(bench: Bench, method: str, length: int, batch: int) -> Found:
    """Of scores that lie in L2, where `score` has left them: our selection and torch.topk, which leaves no order."""
    sizes, device = bench.sizes, bench.device
    generator = torch.Generator(device).manual_seed(0)
    draws = [torch.randn(batch, sizes.heads, length, generator=generator, device=device) for _ in "ab"]
    lengths = torch.full((batch,), length, dtype=torch.int32, device=device)
    keep = min(sizes.keep, length)
    arrivals = torch.zeros(batch * sizes.heads, dtype=torch.int32, device=device)

    def call(scores: Tensor) -> Callable[[], Any]:
        return {
            "select": lambda: select(scores, keep, lengths, arrivals=arrivals),
            "torch.topk": lambda: scores.topk(keep, sorted=False),
        }[method]

    return {"keep": keep, **(bench.timer.microseconds([call(scores) for scores in draws]) or {})}


def measure_trace(bench: Bench, method: str, length: int, batch: int) -> Found:
    """The kernels of a replayed step, as the profiler sees them."""
    made = [methods(bench.sizes)[method](copy).step for copy in bench.held(length, batch)[:8]]
    return kernels_of(made, bench.device)


def run_eagerly(bench: Bench, method: str, length: int, batch: int) -> Found:
    """A few steps, for a tool that watches them."""
    step = methods(bench.sizes)[method](draw(bench.sizes, batch, length, bench.device)).step
    for _ in range(3):
        step()
    return {"steps": 3}


def measure_model(bench: Bench, method: str, length: int, batch: int | None) -> Found:
    """
    Args:
        batch: None: as many rows as fit.
    """
    bench.drop()
    model = bench.model
    rows = fitting(bench.sizes, length, bench.device) if batch is None else batch
    return {"batch": rows, "fits": batch is None, **step_time(model, bench.sizes, length, rows, method)}


def measure_build(bench: Bench, length: int, calibrated: bool) -> Found:
    bench.drop(model=True)
    return build_row(bench.sizes, length, bench.sizes.per_cluster[0], calibrated, bench.timer)


ROUTINES: Mapping[str, Callable[..., Found]] = {
    "machine": machine,
    "check": check,
    "ceilings": measure_ceilings,
    "step": measure_step,
    "parts": measure_parts,
    "baseline": measure_baseline,
    "selection": measure_selection,
    "trace": measure_trace,
    "eager": run_eagerly,
    "model": measure_model,
    "build": measure_build,
}
