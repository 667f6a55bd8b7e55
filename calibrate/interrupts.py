"""Let Ctrl-C and SIGTERM wait until the work at hand is in a state that can be saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any


@contextmanager
def deferred_interrupt(enabled: bool = True, *, insist: bool = True) -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether an interrupt came; a second one acts at once if `insist`.

    Under torchrun one Ctrl-C arrives twice, from the terminal and from torchrun. Does nothing off the main thread,
    where Python delivers no signals.
    """
    came = False

    def remember(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True
        if insist:
            signal.signal(number, previous[number])

    if not enabled or threading.current_thread() is not threading.main_thread():
        yield lambda: False
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
