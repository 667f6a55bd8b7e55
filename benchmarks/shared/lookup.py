"""Numbers by key from results: a key that names nothing, or several things, is an error that says what there is."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


class NotMeasured(LookupError):
    """The key, the file, and what could have been meant."""


def load(path: Path) -> Any:
    if not path.exists():
        others = sorted(other.stem for other in path.parent.glob("*.json"))
        raise NotMeasured(f"{path.name}: there is no such file in {path.parent}; there are {', '.join(others)}")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise NotMeasured(f"{path}: not JSON: {error}") from None


def read(path: Path) -> dict[str, Any]:
    """{} for what has not been measured."""
    return load(path) if path.exists() else {}


def pick(found: Any, keys: Iterable[str], where: str) -> Any:
    """What lies below some keys, one after the other."""
    for key in keys:
        if not isinstance(found, Mapping) or key not in found:
            known = ", ".join(map(str, found)) if isinstance(found, Mapping) else f"a {type(found).__name__}"
            raise NotMeasured(f"{where}: no {key!r}; there are {known}")
        found = found[key]
    return found


def only(rows: Iterable[Row], wanted: Row, where: str) -> Row:
    """The one row that has all of these values; None: it has no such name."""
    rows = list(rows)
    found = [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]
    if len(found) != 1:
        shown = "; ".join(map(_brief, found or rows)) or "none"
        raise NotMeasured(f"{where}: {len(found)} rows have {_brief(wanted)}; there are {shown}")
    return found[0]


def _brief(row: Row) -> str:
    return " ".join(f"{name}={value}" for name, value in row.items() if isinstance(value, str | int | float))[:160]
