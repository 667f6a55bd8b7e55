"""The names that `--tasks` takes."""

from __future__ import annotations

from collections.abc import Sequence

from ....artifacts import KvcalError
from . import ruler_package

FACTS = {"passkey": 1, "multikey": 8}
"""Recall tasks: how many facts stand in the context, one of which is asked for."""
ON_TEXT = ("perplexity", *FACTS)
"""Made of the text that is given."""
RULER = ruler_package.NAMES
TASKS = (*ON_TEXT, *RULER)
_ALL_OF_RULER = "ruler"


def parse_tasks(words: Sequence[str]) -> list[str]:
    """Each once, in the order given, with all of RULER's in place of "ruler".

    Raises:
        KvcalError: an unknown name, or none; or one of RULER's without its package.
    """
    unknown = next((word for word in words if word not in (*TASKS, _ALL_OF_RULER)), None)
    if unknown is not None or not words:
        what = f"no task {unknown!r}" if unknown is not None else "no tasks"
        raise KvcalError(f"{what}: choose among {', '.join(ON_TEXT)}, {_ALL_OF_RULER} (all of {', '.join(RULER)})")
    found = [name for word in words for name in (RULER if word == _ALL_OF_RULER else (word,))]
    if set(found) & set(RULER):
        ruler_package.ruler_tasks()
    return list(dict.fromkeys(found))
