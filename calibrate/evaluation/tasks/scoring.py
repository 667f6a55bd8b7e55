"""How a prediction is scored against its references."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

Scoring = Callable[[str, Sequence[str]], float]
"""(prediction, references) -> 0 to 1."""


def settled(scoring: Scoring, prediction: str, answers: Sequence[str]) -> bool:
    """Whether a prediction has a score of 1 that more text would leave at 1, so that decoding can stop.

    A word may become another ("Paris", "Parisian"), and a number, too ("5", "57", "5,000").
    """
    return all(scoring(prediction + more, answers) >= 1 for more in ("", "a", "000"))


def digits(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction's first number begins with an answer, whatever words or spaces stand before it."""
    found = re.search(r"\d+", prediction)
    return float(found is not None and found.group().startswith(tuple(answers)))


SCORINGS: dict[str, Scoring] = {"digits": digits}
