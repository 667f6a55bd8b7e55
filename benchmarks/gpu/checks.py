"""The gate's checks by name. Each runs in a process of its own, so that a fault in one kernel is that check's alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from .attention_steps import methods
from .baselines import first_line
from .gate import Gate, check_append, check_cluster, check_score
from .gate_attention import check_attend, check_dense, check_step
from .gate_select import check_select
from .sizes import Sizes

KERNELS: dict[str, Callable[[Gate], None]] = {
    "append": check_append,
    "score": check_score,
    "select": check_select,
    "dense": check_dense,
    "attend": check_attend,
    "cluster": check_cluster,
}


def checks(sizes: Sizes) -> dict[str, Callable[[Gate], None]]:
    """Of every kernel, and of every method's whole step: "step loki"."""
    return KERNELS | {f"step {name}": partial(check_step, method=name) for name in methods(sizes)}


def checked(gate: Gate, name: str) -> dict[str, Any]:
    """{"passed", "worst": the largest error as a share of what is allowed, "found": all that was compared}."""
    found: dict[str, Any] = {}
    try:
        checks(gate.sizes)[name](gate)
        if gate.device.type == "cuda":
            torch.cuda.synchronize()
    except Exception as problem:  # what was compared before is kept
        found["failed"] = first_line(f"{type(problem).__name__}: {problem}")
    ratios = [of["error"] / of["allowed"] for of in gate.found if of["error"] is not None and of["allowed"]]
    passed = "failed" not in found and all(of["passed"] for of in gate.found)
    return {"passed": passed, "worst": max(ratios, default=0.0), **found, "found": gate.found}
