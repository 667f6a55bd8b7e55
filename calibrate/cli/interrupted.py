"""What to say when Ctrl-C or SIGTERM ends a command: what is kept, and how to go on; and which exit code says so."""

from __future__ import annotations

import signal

from ..interrupts import Interrupted, Terminated, raised_on
from .user_error import EndedByInterrupt, EndedBySigterm, UserError

_PASS = "what had been saved, if anything, is kept: repeat the command with --resume to go on"
_KEPT = {
    "pca": _PASS,
    "analyze-rank": _PASS,
    "run": _PASS,
    "demo": "what had been saved is kept: repeat the command to go on",
    "share": "what had been saved is kept: repeat the command, with --resume where it trained, to go on",
    "plan": "what was measured is kept: repeat the command to go on",
}


def signal_of(error: BaseException) -> int | None:
    """The signal that an error is the doing of; None: of none."""
    if isinstance(error, Interrupted):
        return error.number
    if isinstance(error, KeyboardInterrupt):
        return signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
    return raised_on()


def ended(error: BaseException, number: int, command: str | None) -> UserError:
    """What to end with: one line, and the exit code that shells have for the signal."""
    kind = EndedBySigterm if number == signal.SIGTERM else EndedByInterrupt
    if isinstance(error, Interrupted):  # says itself what is kept
        return kind(str(error))
    word = "ended by SIGTERM" if number == signal.SIGTERM else "interrupted"
    kept = _KEPT.get(command or "", "nothing was changed on the disk: repeat the command to begin anew")
    return kind(f"{word}: {kept}")
