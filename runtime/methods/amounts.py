"""Parameters that are a fraction or a count: 0.25 of the tokens, or 1024 of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...artifacts import KvcalError

MOST_TOKENS = 2**31 - 1
"""Kernels count in int32."""
Amount = float | int
"""float in (0, 1]: a fraction; int >= 1: a count."""


def count_of(amount: Amount, total: int) -> int:
    """How many of `total`: at least 1, at most all; fractions are rounded up."""
    # 0.55 · 100 is 55.00000000000001 in floating point and means 55.
    wanted = math.ceil(amount * total - 1e-9) if isinstance(amount, float) else amount
    return max(1, min(total, wanted))


def check_amount(name: str, amount: object, limit: int | None = None, what: str = "") -> None:
    """Raises KvcalError unless `amount` is a fraction in (0, 1] or a count from 1 to `limit`."""
    if isinstance(amount, bool) or not isinstance(amount, (int, float)):
        raise KvcalError(f"{name} {amount!r}: give a fraction such as 0.25 or a count such as 32")
    if not amount > 0:
        raise KvcalError(f"{name} {amount}: give a fraction above 0, or a count of at least 1")
    if isinstance(amount, float) and amount > 1:
        raise KvcalError(f"{name} {amount}: a fraction is at most 1.0; a count is written without a point")
    if limit is not None and isinstance(amount, int) and amount > limit:
        raise KvcalError(f"{name} {amount} is above {what} {limit}: give at most {limit}, or a fraction such as 0.25")


def check_count(name: str, count: object, least: int = 0, most: int = MOST_TOKENS) -> None:
    """Raises KvcalError unless `count` is an int from `least` to `most`."""
    if isinstance(count, bool) or not isinstance(count, int) or count < least:
        raise KvcalError(f"{name} {count!r}: give a whole number of at least {least}")
    if count > most:
        raise KvcalError(
            f"{name} {count:.4g}: give at most {most}" if count < 1e300 else f"{name}: give at most {most}"
        )


def check_number(name: str, number: object, least: float, most: float, what: str) -> None:
    """Raises KvcalError unless `number` is one from `least` to `most`."""
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not least <= number <= most:
        raise KvcalError(f"{name} {number!r}: give {what} from {least:g} to {most:g}")


def check_flag(name: str, flag: object) -> None:
    """Raises KvcalError unless `flag` is a bool."""
    if not isinstance(flag, bool):
        raise KvcalError(f"{name} {flag!r}: give True or False")


def check_choice(name: str, choice: object, known: tuple[str, ...]) -> None:
    """Raises KvcalError unless `choice` is one of `known`."""
    if choice not in known:
        raise KvcalError(f"{name} {choice!r}: give {' or '.join(known)}")


@dataclass(frozen=True)
class Budget:
    """How many tokens a step reads, or a store holds."""

    keep: Amount = 0.25
    """A fraction of the sequence's tokens at this step, the new one included, or a count."""
    dense_below: int = 0
    """Sequences of fewer tokens are read, or held, whole."""

    def check(self) -> None:
        """Raises KvcalError for invalid parameters."""
        check_amount("keep", self.keep)
        check_count("dense_below", self.dense_below)

    def of(self, length: int) -> int:
        """How many tokens are read, or held, of a sequence of `length`."""
        return length if length < self.dense_below else count_of(self.keep, length)

    def most(self, length: int) -> int:
        """The largest `of` any sequence that has at most `length` tokens."""
        return max(self.of(length), min(length, self.dense_below - 1))
