"""How a prediction is scored against its references."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

Scoring = Callable[[str, Sequence[str]], float]
"""(prediction, references) -> 0 to 1. More text after a prediction of 1 leaves it at 1, so that decoding can stop."""


def digits(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction's first number begins with an answer, whatever words or spaces stand before it."""
    found = re.search(r"\d+", prediction)
    return float(found is not None and found.group().startswith(tuple(answers)))


SCORINGS: dict[str, Scoring] = {"digits": digits}
