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
    """Signals that come in the context take effect when it ends: they end the process or raise from a handler.

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
        with ExitStack() as stack:  # every callback runs, also when a handler that is back already raises
            for missed in dict.fromkeys(held.came):
                stack.callback(os.kill, os.getpid(), missed)
            for number_and_handler in held.previous.items():
                stack.callback(signal.signal, *number_and_handler)


class _Held:
    """A handler that remembers signals while it holds; after that, a signal goes to the handler before it."""

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
