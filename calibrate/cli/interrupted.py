"""What to say when Ctrl-C or SIGTERM ends a command: what is kept, and how to go on; and which exit code says so."""

from __future__ import annotations

import signal

import click

from ..interrupts import Interrupted, Terminated

_PASS = "the last state that was saved is kept: repeat the command with --resume to go on"
_KEPT = {
    "pca": _PASS,
    "analyze-rank": _PASS,
    "run": _PASS,
    "demo": "the last state that was saved is kept: repeat the command to go on",
    "plan": "what was measured is kept: repeat the command to go on",
}


def exit_code(error: BaseException) -> int:
    """128 and the signal's number, as shells have it."""
    if isinstance(error, Interrupted):
        return 128 + error.number
    return 128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)


def message(error: KeyboardInterrupt, ctx: click.Context) -> str:
    """One line for a command that has not said itself what is kept.

    Args:
        ctx: of the group.
    """
    word = "ended by SIGTERM" if isinstance(error, Terminated) else "interrupted"
    name = ctx.invoked_subcommand or ""
    return f"{word}: {_KEPT.get(name, 'nothing was changed on the disk: repeat the command to begin anew')}"
