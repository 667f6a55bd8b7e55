"""Samples of a task with what each method answered, from the predictions beside a results file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...artifacts import KvcalError
from ..evaluation import predictions
from ..evaluation.results_file import parameters
from ..plots import short_name
from .measured import Evaluation
from .numbers import number

MOST_SAMPLES = 20
"""Of a task that are shown."""
MOST_SHOWN = 300
"""Characters of a question or an answer."""


@dataclass(frozen=True)
class Answer:
    method: str
    settings: str
    text: str
    score: float | None


@dataclass(frozen=True)
class Sample:
    task: str
    number: int
    question: str
    """Its end; "" in results of an earlier kvcal, which did not keep it."""
    expected: str
    answers: tuple[Answer, ...]
    """By method, in the order of the results."""


def samples(found: Evaluation) -> list[Sample]:
    """The first `MOST_SAMPLES` of every task; [] where no predictions lie beside the results.

    Raises:
        KvcalError: something else lies there.
    """
    path = predictions.beside(found.path)
    if not path.exists():
        return []
    by_sample: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for line in predictions.read(path):
        if type(line["index"]) is not int:
            raise KvcalError(f"{path}: not predictions of an evaluation (an index {line['index']!r}): remove it")
        by_sample.setdefault((str(line["task"]), line["index"]), []).append(line)
    kept: list[Sample] = []
    counts: dict[str, int] = {}
    for (task, index), lines in sorted(by_sample.items()):
        counts[task] = counts.get(task, 0) + 1
        if counts[task] <= MOST_SAMPLES:
            kept.append(_sample(task, index, lines))
    return kept


def _sample(task: str, index: int, lines: list[dict[str, Any]]) -> Sample:
    first = lines[0]
    expected = first.get("answers")
    return Sample(
        task=short_name(task),
        number=index + 1,
        question=_shown(first.get("question") or ""),
        expected=_shown(" / ".join(map(str, expected)) if isinstance(expected, list) else ""),
        answers=tuple(map(_answer, lines)),
    )


def _answer(line: dict[str, Any]) -> Answer:
    setting = line["setting"] if isinstance(line["setting"], dict) else {}
    stated = {name: value for name, value in parameters(setting).items() if name != "method"}
    return Answer(
        method=short_name(setting.get("method", "?")),
        settings=short_name(", ".join(f"{name} {value}" for name, value in stated.items()), 200),
        text=_shown(line["prediction"]),
        score=number(line.get("score")),
    )


def _shown(text: object) -> str:
    return short_name(str(text).strip(), MOST_SHOWN)
