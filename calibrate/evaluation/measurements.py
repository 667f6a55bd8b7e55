"""What is measured of one setting: raw numbers by batch.

Raw numbers are JSON-able, floats go through JSON unchanged, and batches are independent: an interrupted
run goes on with the batches that are missing and ends at the same figures.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from .prompts import Prompts
from .tasks.sample import Sample, Task

PERPLEXITY = "perplexity"
"""What the windows of text are called among the tasks."""


@dataclass(frozen=True)
class Batch:
    """Windows, or samples of a task, that are prefilled and decoded together."""

    task: str
    """"perplexity", or the key of a task."""
    first: int
    """Number of its first window, or of its first sample in the order in which the task's are decoded."""
    rows: int
    samples: tuple[int, ...] = ()
    """Their indices in the task; () for windows."""

    @property
    def key(self) -> str:
        return f"{self.task} {self.first}+{self.rows}"


@dataclass(frozen=True)
class Measured:
    """One setting on one batch."""

    rows: int
    nll: list[float]
    """Of each window, nats summed over its continuation; [] for a task."""
    samples: list[dict[str, Any]]
    """What was answered: {"index" in the task, "question": its end, "prediction", "answers", "score", "depth"}; [] for
    windows."""
    resident_bytes: int
    """Of all layers and rows, after the last step."""
    bytes_read: list[int]
    """Of each step."""
    ms: list[float]
    """Of each step, the model's whole forward call."""
    error: dict[str, list[float]] = field(default_factory=dict)
    """By layer (as JSON has it), of each row the mean relative error of the attention output; {} where not probed."""
    mass: dict[str, list[float]] = field(default_factory=dict)
    device_hits: list[int] = field(default_factory=lambda: [0, 0])
    """Of an offloaded cache: tokens read that lay on the device already, tokens read."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def batches(prompts: Prompts, batch_size: int, even: bool = False) -> list[Batch]:
    """
    Args:
        even: only questions of equal length are in one batch.
    """
    found = []
    if prompts.windows:
        rows = range(len(prompts.windows.ids))
        found = [Batch(PERPLEXITY, at, len(rows[at : at + batch_size])) for at in rows[::batch_size]]
    for task in prompts.tasks:
        first = 0
        for group in _groups(task, even):
            for at in range(0, len(group), batch_size):
                samples = tuple(group[at : at + batch_size])
                found.append(Batch(task.key, first + at, len(samples), samples))
            first += len(group)
    return found


def _groups(task: Task, even: bool) -> list[list[int]]:
    """Indices of samples, longest context first: little is padded, and a lack of memory shows early. With `even` there
    is a group for each length of question."""
    groups: dict[int, list[int]] = {}
    for index in sorted(range(len(task.samples)), key=lambda index: -len(task.samples[index].context)):
        groups.setdefault(len(task.samples[index].question) if even else 0, []).append(index)
    return list(groups.values())


def samples_of(prompts: Prompts, batch: Batch) -> tuple[Task, dict[int, Sample]] | None:
    """(task, samples by their index in it); None: the batch is of windows."""
    task = next((task for task in prompts.tasks if task.key == batch.task), None)
    return None if task is None else (task, {index: task.samples[index] for index in batch.samples})


def most_steps(prompts: Prompts, batch: Batch, decoded: bool) -> int:
    """Decoded steps of one setting on a batch, at most.

    Args:
        decoded: questions are decoded, too.
    """
    found = samples_of(prompts, batch)
    if found is None:
        assert prompts.windows is not None
        return prompts.windows.continuations.shape[1] - 1
    task, samples = found
    asked = max(len(sample.question) for sample in samples.values()) if decoded else 0
    return max(1, asked + task.new_tokens - 1)
