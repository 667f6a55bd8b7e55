"""Progress where stderr is no terminal: a line now and then, so that a log tells a long run from one that hangs."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SWITCH = "KVCAL_PROGRESS"
"""Environment variable: 0 for neither bars nor lines."""


def due() -> Iterator[int]:
    """Seconds after which a line is due: work of less than ten is not worth one, and long work is worth fewer."""
    yield from (10, 30)
    yield from range(60, 600, 60)
    yield from itertools.count(600, 300)


class LoggedWork:
    """What is going on, for how long, and how far it is."""

    def __init__(
        self,
        title: str,
        write: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        *,
        estimate: bool = True,
    ):
        self.title, self._write, self._clock, self._estimate = title, write, clock, estimate
        self._begun = clock()
        self._first: tuple[float, int] | None = None
        self._newest: tuple[int, int | None, str] | None = None
        self._spoken = False

    def update(self, done: int, total: int | None, note: str = "") -> None:
        """Nothing is written here, so that work of many small steps is not slowed down."""
        if self._first is None:
            self._first = (self._clock(), done)  # a resumed run begins with what others did
        self._newest = (done, total, note)

    def speak(self, wait: Callable[[float], bool]) -> None:
        """Write a line whenever one is due, until `wait(seconds)` says that the work has ended."""
        for second in due():
            pause = self._begun + second - self._clock()
            if pause < 0:
                continue  # nobody was awake: one line for all that were missed
            if wait(pause):
                return
            self._spoken = True
            self._write(self.line())

    def end(self) -> None:
        """The last line, where there was an earlier one."""
        if self._spoken:
            progress = f" · {self._newest[0]} of {self._newest[1]}" if self._newest and self._newest[1] else ""
            self._write(f"{self.title}: done{progress} · {_clock_time(self._clock() - self._begun)}")

    def line(self) -> str:
        """ "calibrating: 12 of 64 · 3:20 so far · about 14:27 left"."""
        now = self._clock()
        parts = [f"{_clock_time(now - self._begun)} so far"]
        if self._newest is not None and self._first is not None:
            (since, before), (done, total, note) = self._first, self._newest
            if total:
                parts.insert(0, f"{done} of {total}")
            if self._estimate and total and done > before:
                parts.append(f"about {_clock_time((now - since) * (total - done) / (done - before))} left")
            parts += [note] if note else []
        return f"{self.title}: {' · '.join(parts)}"


@contextmanager
def logged(title: str, say: Callable[[str], None], estimate: bool = True) -> Iterator[Callable[..., None]]:
    """Yields update(done, total, note=""); meanwhile a thread of its own writes lines to stderr, also while
    the work reports nothing. Of several processes rank 0 alone has a stderr (`one_job`)."""

    def write(line: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody reads the log any more: no reason to end the work
            say(line)

    work, ended = LoggedWork(title, write, estimate=estimate), threading.Event()
    thread = threading.Thread(target=work.speak, args=(ended.wait,), name="progress", daemon=True)
    thread.start()
    try:
        yield work.update
    finally:
        ended.set()
        thread.join()
    work.end()


def switched_off() -> bool:
    return os.environ.get(SWITCH) == "0"


def _clock_time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
