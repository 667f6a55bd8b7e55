"""Hold signals back while something must not stop halfway."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
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
        try:
            _each([partial(signal.signal, *each) for each in previous.items()])
        finally:
            _each([partial(os.kill, os.getpid(), missed) for missed in dict.fromkeys(came)])


def _each(calls: list[Callable[[], object]]) -> None:
    """All of them, even when one raises, as a signal does whose handler is back."""
    if calls:
        try:
            calls[0]()
        finally:
            _each(calls[1:])
