"""How a prediction is scored against its references."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable, Sequence
from functools import partial

from .ruler_package import metric

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


def exact(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction's first line is an answer (of one of n lines: its first n lines), both normalised."""
    lines = prediction.strip().splitlines()

    def is_said(answer: str) -> bool:
        first = " ".join(lines[: len(answer.strip().splitlines())])
        form = form_of(answer)
        return form(first) == form(answer)

    return float(any(map(is_said, answers)))


def part(prediction: str, answers: Sequence[str]) -> float:
    """1 if an answer stands in the prediction, both normalised: as whole words and numbers where they are in ASCII.

    Words that punctuation separates count as one word or as several ("U.S.", "yes/no").
    """

    def is_said(answer: str) -> bool:
        form = form_of(answer)
        return any(_within(form(apart(answer)), form(apart(prediction))) for apart in (str, _words_apart))

    return float(any(map(is_said, answers)))


def form_of(answer: str) -> Callable[[str], str]:
    """How an answer and a prediction are normalised to be compared: as strongly as leaves something of the answer."""
    return next((form for form in (without_articles, without_punctuation) if form(answer)), lower_case)


def without_articles(text: str) -> str:
    """As SQuAD compares answers: as `without_punctuation`, and without a, an, the."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", without_punctuation(text)).split())


def without_punctuation(text: str) -> str:
    """As `lower_case`, and without punctuation, apart from what stands within or before a number: 3.5 is not 35, nor
    -5 5, but 5,000 is 5000."""
    return " ".join(_punctuation_as("", text).split())


def _words_apart(text: str) -> str:
    return _punctuation_as(" ", text)


def _punctuation_as(replacement: str, text: str) -> str:
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", lower_case(text))
    kept = (
        mark if not _is_punctuation(mark) or _of_a_number(text, at) else replacement for at, mark in enumerate(text)
    )
    return "".join(kept)


def lower_case(text: str) -> str:
    """In lower case, with single spaces."""
    return " ".join(unicodedata.normalize("NFC", text).lower().split())


def _is_punctuation(mark: str) -> bool:
    return mark in string.punctuation or unicodedata.category(mark).startswith("P")


def _of_a_number(text: str, at: int) -> bool:
    before, after = text[:at][-1:], text[at + 1 : at + 2]
    return after.isdigit() and (before.isdigit() or (text[at] in "-." and not before.strip()))


def _within(answer: str, text: str) -> bool:
    if not answer:
        return False
    start, end = (r"(?<!\w)" if answer[0].isascii() else ""), (r"(?!\w)" if answer[-1].isascii() else "")
    if answer[0].isdigit():  # a number may have begun before, …
        start += r"(?<!\d[^\w\s])(?<![-.])"
    if answer[-1].isdigit():  # … or go on behind a point
        end += r"(?![^\w\s]\d)"
    return re.search(start + re.escape(answer) + end, text) is not None


SCORINGS: dict[str, Scoring] = {
    "digits": digits,
    "exact": exact,
    "part": part,
    # RULER's own, as its package has them: the share of the answers that stand in the prediction, or whether one does.
    "string_match_all": partial(metric, "string_match_all"),
    "string_match_part": partial(metric, "string_match_part"),
}
