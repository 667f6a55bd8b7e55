"""Numbers that strangers wrote into files, as far as a page can show them."""

from __future__ import annotations

from typing import Any

MOST = 1e100
"""Beyond it squares and their sums overflow."""


def number(value: Any) -> float | None:
    """The value as a float; None: it is none, or NaN, infinite or beyond `MOST`, none of which a figure can draw."""
    return float(value) if type(value) in (int, float) and abs(value) <= MOST else None
