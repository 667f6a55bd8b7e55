"""How long an evaluation will take: from what its first steps took, and again as more of it is known."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

STEPS = 4
"""Of the first setting, after which the first estimate is made: the very first step is slower than others."""


@dataclass(frozen=True)
class Part:
    """A batch, and the settings that are measured on it."""

    length: int
    """Tokens of its longest row that are prefilled."""
    rows: int
    prefills: int
    """How often they are prefilled: once for each model, the shared ones of `cla` included."""
    steps: int
    """Of each setting, at most: an answer may end earlier."""
    settings: tuple[Hashable, ...]


class Schedule:
    """Measures seconds per prefilled token and per step of each setting, and estimates the parts to come by them.

    A prefill is estimated from the measured batch of the nearest length, a setting that has not run yet by the mean of
    those that have.
    """

    def __init__(self, parts: Sequence[Part], clock: Callable[[], float] = time.perf_counter):
        self.parts = list(parts)
        self._clock, self._made_at = clock, clock()
        self._per_token: dict[int, float] = {}
        """Seconds, by length."""
        self._taken: dict[Hashable, list[float]] = {}
        """[seconds, steps] of each setting, over the batches that it has finished."""
        self._planned, self._made = 0, 0
        """Of the finished settings and batches: steps that there could have been, and steps taken."""
        self._todo = [(part, list(part.settings)) for part in self.parts]
        self._at: tuple[Hashable, float, int] | None = None
        """(setting, its start, its steps so far) of the setting that is running."""
        self._prefilled = 0
        """Prefills done of the current part."""

    def prefilling(self) -> Callable[[], None]:
        """Start timing a prefill; returns what to call when it is done."""
        started = self._clock()

        def done() -> None:
            part = self._todo[0][0]
            self._per_token[part.length] = (self._clock() - started) / (part.length * part.rows)
            self._prefilled += 1

        return done

    def begin(self, setting: Hashable) -> None:
        self._at = (setting, self._clock(), 0)

    def step(self) -> None:
        assert self._at is not None
        setting, started, steps = self._at
        self._at = (setting, started, steps + 1)

    def finish(self) -> int:
        """The running setting is done with the current part; returns the steps that it could have taken."""
        assert self._at is not None
        setting, started, steps = self._at
        seconds = self._taken.setdefault(setting, [0.0, 0])
        seconds[0] += self._clock() - started
        seconds[1] += steps
        self._at = None
        part, left = self._todo[0]
        self._planned, self._made = self._planned + part.steps, self._made + steps
        left.remove(setting)
        if not left:
            self._todo.pop(0)
            self._prefilled = 0
        return part.steps

    @property
    def begun(self) -> bool:
        """Whether there is enough to say how long it will take."""
        return bool(self._taken) or (self._at is not None and self._at[2] >= STEPS)

    @property
    def seen_all(self) -> bool:
        """Whether every setting has finished a batch."""
        return {setting for part in self.parts for setting in part.settings} <= self._taken.keys()

    def elapsed(self) -> float:
        """Seconds since this was made."""
        return self._clock() - self._made_at

    def remaining(self) -> float:
        """Seconds to go; to be called once `begun`."""
        taken = {setting: list(found) for setting, found in self._taken.items()}
        at_work = 0.0
        if self._at is not None:
            setting, started, steps = self._at
            seconds = taken.setdefault(setting, [0.0, 0])
            at_work = self._clock() - started
            seconds[0] += at_work
            seconds[1] += steps
        rates = {setting: seconds / steps for setting, (seconds, steps) in taken.items() if steps}
        usual = sum(rates.values()) / len(rates)
        share = self._made / self._planned if self._planned else 1.0
        total = -at_work
        for number, (part, left) in enumerate(self._todo):
            prefills = part.prefills - (self._prefilled if number == 0 else 0)
            total += max(0, prefills) * part.rows * part.length * self._rate(part.length)
            total += sum(share * part.steps * rates.get(setting, usual) for setting in left)
        return max(0.0, total)

    def _rate(self, length: int) -> float:
        nearest = min(self._per_token, key=lambda measured: abs(measured - length), default=None)
        return 0.0 if nearest is None else self._per_token[nearest]


def in_words(seconds: float) -> str:
    """ "40 s", "34 min", "5.2 h"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def counted(number: int, what: str) -> str:
    """ "1 batch", "12 batches"."""
    plural = "" if number == 1 else "es" if what.endswith("ch") else "s"
    return f"{number} {what}{plural}"
