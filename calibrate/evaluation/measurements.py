"""What is measured of one setting: raw numbers by batch of rows, and from them a row of the results.

Raw numbers are JSON-able, floats go through JSON unchanged, and batches are independent: an interrupted
run goes on with the batches that are missing and ends at the same figures.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .prompts import Prompts

MEASURED = (
    "perplexity",
    "perplexity_ratio",
    "recall",
    "recall_by_depth",
    "attention_error",
    "attention_mass",
    "resident_bytes",
    "bytes_per_step",
    "ms_per_step",
    "hit_rate",
    "source",
)
"""Keys of a row of the results that are not parameters of its method."""


@dataclass(frozen=True)
class Batch:
    """Rows of equal prefix length that are prefilled and decoded together."""

    task: str
    """"perplexity", or the key of a recall task."""
    first: int
    """Of the task's rows."""
    rows: int

    @property
    def key(self) -> str:
        return f"{self.task} {self.first}+{self.rows}"


@dataclass(frozen=True)
class Measured:
    """One setting on one batch."""

    nll: list[float]
    """Of each row, nats summed over its continuation (for a question without meaning)."""
    exact: list[bool]
    """Of each row, whether every answer token was the likeliest; [] where nothing was asked."""
    resident_bytes: int
    """Of all layers and rows, after the last step."""
    bytes_read: list[int]
    """Of each step."""
    ms: list[float]
    """Of each step, the model's whole forward call."""
    error: dict[str, float]
    """By layer (as JSON has it), mean relative error of the attention output; {} where not probed."""
    mass: dict[str, float]
    device_hits: list[int] = field(default_factory=lambda: [0, 0])
    """Of an offloaded cache: tokens read that lay on the device already, tokens read."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def batches(prompts: Prompts, batch_size: int) -> list[Batch]:
    sizes = {"perplexity": len(prompts.windows.ids)} if prompts.windows else {}
    sizes |= {task.key: len(task.answers) for task in prompts.recall}
    return [
        Batch(task, first, min(batch_size, size - first))
        for task, size in sizes.items()
        for first in range(0, size, batch_size)
    ]


def result_row(
    setting: Mapping[str, Any],
    measured: Mapping[str, Measured],
    prompts: Prompts,
    batch_size: int,
    layers: int,
    full: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """One entry of "results".

    Bytes and times are those of the first task's batches (the perplexity windows, if there are any), since
    they depend on the length of the prefix.

    Args:
        measured: by `Batch.key`, for every batch.
        layers: of the model.
        full: the row of `full`; None when this is it.
    """
    row: dict[str, Any] = {**setting, "perplexity": None, "perplexity_ratio": None, "recall": {}, "recall_by_depth": {}}
    row |= {"attention_error": None, "attention_mass": None}
    by_task: dict[str, list[Measured]] = {}
    for batch in batches(prompts, batch_size):
        by_task.setdefault(batch.task, []).append(measured[batch.key])
    if prompts.windows:
        found = by_task["perplexity"]
        tokens = prompts.windows.continuations.numel()
        nll = math.fsum(each for batch in found for each in batch.nll) / tokens
        row["perplexity"] = _finite(math.exp(nll) if nll < 700 else math.inf)
        row |= _attention(found, layers)
        base = (full or row)["perplexity"]
        row["perplexity_ratio"] = row["perplexity"] / base if base and row["perplexity"] else None
    for task in prompts.recall:
        exact = [each for batch in by_task[task.key] for each in batch.exact]
        row["recall"][task.key] = sum(exact) / len(exact)
        row["recall_by_depth"][task.key] = {
            str(depth): statistics.mean(float(e) for e, d in zip(exact, task.depths, strict=True) if d == depth)
            for depth in sorted(set(task.depths))
        }
    costs = next(iter(by_task.values()))
    counts = [len(batch.nll) for batch in costs]
    row["resident_bytes"] = sum(batch.resident_bytes for batch in costs) / sum(counts)
    row["bytes_per_step"] = sum(statistics.mean(batch.bytes_read) for batch in costs) / sum(counts)
    whole = [batch for batch, count in zip(costs, counts, strict=True) if count == max(counts)]
    row["ms_per_step"] = statistics.median(each for batch in whole for each in batch.ms)
    hits, needed = (sum(batch.device_hits[which] for batch in costs) for which in (0, 1))
    row |= {"hit_rate": hits / needed} if needed else {}
    return row


def _attention(found: Sequence[Measured], layers: int) -> dict[str, list[float | None]]:
    """By layer; None for layers that keep the model's own cache."""
    rows = [len(batch.nll) for batch in found]
    out: dict[str, list[float | None]] = {}
    for name, kind in (("attention_error", "error"), ("attention_mass", "mass")):
        by_layer: list[float | None] = []
        for layer in map(str, range(layers)):
            parts = [getattr(batch, kind).get(layer) for batch in found]
            known = None not in parts
            mean = sum(part * count for part, count in zip(parts, rows, strict=True)) / sum(rows) if known else None
            by_layer.append(_finite(mean))
        out[name] = by_layer
    return out


def _finite(value: float | None) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if value is not None and math.isfinite(value) else None
