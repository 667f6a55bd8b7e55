"""Hold signals back while something must not stop halfway."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

_ENDING = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
"""Signals that end a process that has no handler for them."""


@contextmanager
def signals_held() -> Iterator[None]:
    """What signals would do, end the process or raise from a handler, they do when the context ends.

    Does nothing off the main thread, where Python runs no handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held = _Held()
    try:
        for number in signal.valid_signals():
            handler = signal.getsignal(number)
            if callable(handler) or (handler == signal.SIG_DFL and number in _ENDING):
                held.previous[number] = handler
                signal.signal(number, held)
        yield
    finally:
        held.holding = False
        with ExitStack() as stack:  # all of it, also when a handler that is back already raises
            for missed in dict.fromkeys(held.came):
                stack.callback(os.kill, os.getpid(), missed)
            for each in held.previous.items():
                stack.callback(signal.signal, *each)


class _Held:
    """A handler that remembers signals, and that gives way to the one before it when one comes later."""

    def __init__(self) -> None:
        self.holding = True
        self.came: list[int] = []
        self.previous: dict[int, Any] = {}

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.holding:
            self.came.append(number)
        else:  # an interrupt came while handlers were put back
            signal.signal(number, self.previous[number])
            os.kill(os.getpid(), number)
