"""Let Ctrl-C and SIGTERM wait until the work at hand is in a state that can be saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

from ..artifacts import KvcalError


class Interrupted(KvcalError):
    """Work that a signal ended, after what was done had been saved."""

    def __init__(self, message: str, number: int = signal.SIGINT):
        super().__init__(message)
        self.number = number


class Terminated(KeyboardInterrupt):
    """SIGTERM came, where it is treated as Ctrl-C is."""


_raised: int | None = None


def raise_on_signals() -> None:
    """Let the first Ctrl-C or SIGTERM raise, wherever it comes; a second one ends the process at once."""

    def end(number: int, frame: FrameType | None) -> None:
        global _raised
        _raised = number
        signal.signal(number, signal.SIG_DFL)
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, end)


def raised_on() -> int | None:
    """The signal that `raise_on_signals` has raised on. Whatever error comes after it is its doing: libraries that are
    interrupted while they are imported raise what they like."""
    return _raised


@contextmanager
def deferred_interrupt(enabled: bool = True, *, insist: bool = True) -> Iterator[Callable[[], int | None]]:
    """Yields a function that tells which signal came, None if none did; a second one acts at once if `insist`.

    Under torchrun one Ctrl-C arrives twice, from the terminal and from torchrun. Does nothing off the main thread,
    where Python delivers no signals.
    """
    came: int | None = None

    def remember(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = number
        if insist:
            signal.signal(number, previous[number])

    if not enabled or threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    previous: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in previous:
            signal.signal(number, remember)
        yield lambda: came
    finally:
        with ExitStack() as stack:  # both handlers return, also when one that is back already raises
            for number, handler in previous.items():
                stack.callback(signal.signal, number, handler)
