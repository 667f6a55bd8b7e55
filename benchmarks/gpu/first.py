"""The first run on a GPU, six minutes: is it right, how fast is an attention step, and where does its time go.

It writes OUT/first.json and first.log.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .run import Phase
from .sizes import Sizes

Rows = list[dict[str, Any]]
CHECKS = ("select", "score", "attend", "dense", "append", "cluster")
"""Of kernels; those of whole steps, which compile most, begin before them."""
TELLING, TRACED = slice(0, 4), slice(1, 4)
"""Of `Sizes.methods`: those whose parts are measured, also at other lengths; those whose steps are traced."""
BASELINES = (
    "SDPA flash, grouped", "SDPA flash", "SDPA cuDNN, grouped", "SDPA cuDNN", "SDPA efficient, grouped",
    "SDPA efficient", "FlashInfer", "flash-attn 3", "flash-attn",
)  # fmt: skip
SELECTIONS = ("select", "torch.topk")


def phases(sizes: Sizes) -> list[Phase]:
    longest, *shorter = sizes.lengths
    telling = sizes.methods[TELLING]
    steps = [row for batch in sizes.batches for row in attention(sizes.methods, longest, batch)]
    parts = [row for batch in sizes.batches for row in rows("parts", telling, longest, batch)]
    selections = [row for batch in sizes.batches for row in rows("selection", SELECTIONS, longest, batch)]
    traces = [row for batch in sizes.batches for row in rows("trace", sizes.methods[TRACED], longest, batch)]
    lengths = [
        row for length in shorter for batch in sizes.batches for row in attention(telling, length, batch, few=True)
    ]
    compiled = [row for batch in sizes.batches for row in rows("baseline", ["flex attention"], longest, batch)]
    return [
        Phase("gate", gate(sizes), most=120, limit=100, needs=10, at_once=8, fresh=True),
        Phase("attention steps", [{"kind": "ceilings"}, *steps], most=170, kept=120, limit=45),
        Phase("their parts, and selection", [*parts, *selections], most=60, limit=30),
        Phase("traces", traces, most=60, kept=45, limit=25),
        Phase("other lengths", lengths, most=120, limit=30),
        Phase("flex attention, which compiles", compiled, most=90, limit=60, needs=30),
    ]


def gate(sizes: Sizes) -> Rows:
    whole = [f"step {method}" for method in reversed(sizes.methods)]
    return [{"kind": "check", "check": check} for check in (*whole, *CHECKS)]


def attention(methods: Sequence[str], length: int, batch: int, few: bool = False) -> Rows:
    """Steps and baselines over the same caches: what all are compared with, our steps, and other baselines."""
    fastest, others = BASELINES[:1], BASELINES[2:3] if few else BASELINES[1:]
    measured = ("baseline", fastest), ("step", methods), ("baseline", others)
    return [row for kind, names in measured for row in rows(kind, names, length, batch)]


def rows(kind: str, methods: Iterable[str], length: int, batch: int) -> Rows:
    return [{"kind": kind, "method": method, "length": length, "batch": batch} for method in methods]
