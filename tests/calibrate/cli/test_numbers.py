"""Numbers in tables: three digits that count, never an exponent."""

from __future__ import annotations

import math
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcal.calibrate.cli.numbers import UNKNOWN, fixed, megabytes, plain


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.2e3, "1200"),
        (1234.5, "1234"),
        (99.96, "100"),
        (9.996, "10.0"),
        (0.0001234, "0.000123"),
        (-12.34, "-12.3"),
        (0.0, "0"),
        (7, "7"),
        (123456789012, "123456789012"),
        (1e30, "> 1000000000"),
        (-1e30, "< -1000000000"),
        (1e-9, "< 0.000001"),
        (math.inf, "> 1000000000"),
        (math.nan, UNKNOWN),
        (None, UNKNOWN),
    ],
)
def test_plain(value: float | None, text: str) -> None:
    assert plain(value) == text


@given(st.floats(1e-6, 1e9) | st.floats(-1e9, -1e-6))
def test_plain_errs_by_half_a_unit_of_the_third_digit(value: float) -> None:
    text = plain(value)
    assert set(text) <= set("-0123456789.")
    places = Decimal(value).adjusted()
    assert abs(Decimal(text) - Decimal(value)) <= Decimal("0.5000001") * Decimal(10) ** max(places - 2, -(10**6))


def test_fixed_and_megabytes() -> None:
    assert fixed(3.14159, 2) == "3.14" and fixed(12345.678, 2) == "12345.68" and fixed(None, 2) == UNKNOWN
    assert fixed(1e40, 2) == "> 1000000000"
    assert megabytes(1234567) == "1.23 MB" and megabytes(294e6) == "294 MB" and megabytes(None) == UNKNOWN
