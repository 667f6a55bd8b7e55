"""Hold signals back while something must not stop halfway."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
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
    came: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        came.append(number)

    previous: dict[int, Any] = {}
    try:
        for number in signal.valid_signals():
            handler = signal.getsignal(number)
            if callable(handler) or (handler == signal.SIG_DFL and number in _ENDING):
                previous[number] = handler
                signal.signal(number, remember)
        yield
    finally:
        _restore(list(previous.items()))
        for missed in came:
            os.kill(os.getpid(), missed)


def _restore(handlers: list[tuple[int, Any]]) -> None:
    """All of them, even when one that is back already raises."""
    if handlers:
        try:
            signal.signal(*handlers[0])
        finally:
            _restore(handlers[1:])
