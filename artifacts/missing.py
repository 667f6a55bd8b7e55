"""What to say of a path that does not exist, with the nearest name that does."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from .errors import KvcalError

_MOST_NAMES = 5000
"""Of a folder, that are compared."""


def does_not_exist(path: str | os.PathLike[str], else_do: str = "check the path") -> str:
    """ "PATH: does not exist: did you mean NEAR?".

    Args:
        else_do: what to do where no name is near.
    """
    near = nearest(path)
    shown = os.fspath(path)
    shown = shown if len(shown) <= 1000 else f"{shown[:1000]}…"
    return f"{shown}: does not exist: {f'did you mean {near}?' if near else else_do}"


def check_exists(path: Path) -> None:
    """Raise KvcalError when nothing is at `path`, or only a link to nothing."""
    try:
        there = path.exists()
    except (OSError, ValueError):  # too long, or with a zero byte
        there = False
    if not there:
        raise KvcalError(does_not_exist(path))


def nearest(path: str | os.PathLike[str]) -> Path | None:
    """The path that exists and is spelled most like `path`; None: none is near."""
    try:
        at = Path(path).expanduser()
        parts: list[str] = []
        while not at.exists() and at != at.parent:
            parts.insert(0, at.name)
            at = at.parent
        if not parts or not at.is_dir():
            return None
        with os.scandir(at) as entries:
            names = [entry.name for entry, _ in zip(entries, range(_MOST_NAMES), strict=False)]
    except (OSError, RuntimeError, ValueError):  # not to be looked at, or no such user after ~
        return None
    found = difflib.get_close_matches(parts[0], names, n=1)
    return at / found[0] if found else None
