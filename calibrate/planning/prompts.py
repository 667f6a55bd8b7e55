"""What a plan is measured on, and what it is checked on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...artifacts import KvcalError
from ..evaluation.prompts import Prompts, Windows
from ..evaluation.rows import low_scores

QUESTIONS = 5
"""To measure on: one for each depth."""
STEPS = 16
"""Tokens that are decoded to measure on, where no question says how many."""


@dataclass(frozen=True)
class PlanningRows:
    """What settings are measured on."""

    ids: Tensor
    """[B, T] int64."""
    steps: int
    """Tokens at the end of each row that are decoded."""
    texts: int
    """How many rows, the first ones, are text; the others end in a question and its answer."""


def balanced(values: Tensor, texts: int) -> float:
    """Mean of [B] by row: half from rows of text, half from questions, where there are both."""
    parts = [part for part in values.split([texts, len(values) - texts]) if len(part)]
    return sum(float(part.mean()) for part in parts) / len(parts)


def split_prompts(prompts: Prompts, windows: int, questions: int) -> tuple[PlanningRows, Prompts]:
    """The first windows, and the first questions of the last task, to measure on; the others to check on.

    Raises:
        KvcalError: no windows among the prompts.
    """
    if prompts.windows is None:
        raise KvcalError("a plan is measured on text: let perplexity be among --tasks")
    ids, prefix = prompts.windows.ids, prompts.windows.prefix
    steps, rows = min(STEPS, ids.shape[1] - prefix), ids[:windows]
    if prompts.tasks:
        asked = prompts.tasks[-1].samples[:questions]
        steps = min(max(len(sample.question) + len(sample.reference) for sample in asked), ids.shape[1] - prefix)
        whole = [(*sample.context, *sample.question, *sample.reference) for sample in asked]
        # All rows are equally long: the shortest gives the length, and longer ones lose their beginning, except the
        # first token, to which much attention goes. So the answer is always among the last tokens.
        length = min(prefix + steps, *map(len, whole))
        answered = torch.tensor([(row[0], *row[len(row) - length + 1 :]) for row in whole], dtype=torch.int64)
        rows = torch.cat((rows[:, :length], answered))
    measured = PlanningRows(rows[:, : prefix + steps], steps, windows)
    tasks = tuple(dataclasses.replace(task, samples=task.samples[questions:]) for task in prompts.tasks)
    return measured, Prompts(Windows(ids[windows:], prefix), tasks)


def answerable(full: Mapping[str, Any], prompts: Prompts) -> tuple[Prompts, dict[str, float]]:
    """(the prompts without the tasks that the model itself cannot answer, the scores of those).

    Args:
        full: the row of `full` on them.
    """
    dropped = low_scores(full)
    return dataclasses.replace(prompts, tasks=tuple(task for task in prompts.tasks if task.key not in dropped)), dropped
