"""Numbers for people: three digits that count, and never an exponent."""

from __future__ import annotations

import math

UNKNOWN = "–"
"""Of what was not measured."""
_SMALLEST, _LARGEST = 1e-6, 1e9


def plain(value: float | None, digits: int = 3) -> str:
    """ "1234", "12.3", "0.00123": whole numbers are shown whole.

    Args:
        digits: that count, of a number with a fraction.
    """
    if value is None or math.isnan(value):
        return UNKNOWN
    size = abs(value)
    if 0 < size < _SMALLEST:
        return f"{'> -' if value < 0 else '< '}{_SMALLEST:.6f}"
    if size > _LARGEST and not isinstance(value, int):
        return f"{'< -' if value < 0 else '> '}{_LARGEST:.0f}"
    if isinstance(value, int) or value == 0:
        return str(int(value))
    places = digits - 1 - math.floor(math.log10(size))
    rounded = round(value, places)
    places = max(0, digits - 1 - math.floor(math.log10(abs(rounded))))  # 9.996 is 10.0
    return f"{rounded if places else value:.{places}f}"


def fixed(value: float | None, places: int) -> str:
    """A number with so many places; beyond all measure it is only said to be large."""
    if value is None or math.isnan(value):
        return UNKNOWN
    return plain(value) if abs(value) > _LARGEST else f"{value:.{places}f}"


def megabytes(count: float | None) -> str:
    """ "12.3 MB", of 10⁶ bytes each."""
    return UNKNOWN if count is None else f"{plain(count / 1e6)} MB"
