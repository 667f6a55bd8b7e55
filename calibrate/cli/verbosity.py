"""How much a command says: --quiet and --verbose, which every command and the group have."""

from __future__ import annotations

import functools
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

import click

from .user_error import UserError


class Verbosity(IntEnum):
    QUIET = 0
    """Errors, and the command's result or where it was written."""
    NORMAL = 1
    VERBOSE = 2
    """Also settings, versions, what is loaded from where, how long each phase took, and where an error came from."""


_current = Verbosity.NORMAL


def reset() -> None:
    """Before each command line: a process may run several."""
    _set(Verbosity.NORMAL)


def is_quiet() -> bool:
    return _current == Verbosity.QUIET


def is_verbose() -> bool:
    return _current == Verbosity.VERBOSE


def detail(message: str) -> None:
    """A line on stderr that only --verbose shows."""
    from .output import say  # which needs to know whether to be quiet

    if is_verbose():
        say(f"  {message}")


@contextmanager
def timed(title: str) -> Iterator[None]:
    """With --verbose, say how long something took."""
    begun = time.monotonic()
    yield
    detail(f"{title}: {time.monotonic() - begun:.1f} s")


def detail_traceback(error: BaseException) -> None:
    """With --verbose, show where an error was raised and what caused it."""
    for part in traceback.format_exception(error):
        for line in part.rstrip("\n").split("\n"):
            detail(line)


def detailed(command: Callable[..., Any]) -> Callable[..., Any]:
    """A command that with --verbose first says which versions and settings it runs with."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> Any:
        if is_verbose() and os.environ.get("RANK", "0") == "0":
            from ..one_pass import versions

            ctx = click.get_current_context()
            detail("versions: " + ", ".join(f"{name} {version}" for name, version in versions().items()))
            detail(f"{ctx.info_name}: " + ", ".join(f"{name} {value}" for name, value in ctx.params.items()))
        return command(*args, **options)

    return run


def verbosity_options() -> list[click.Option]:
    """New options, for one command."""
    return [
        _option(("-q", "--quiet"), Verbosity.QUIET, "Print errors and the result only, or where it was written."),
        _option(
            ("-v", "--verbose"), Verbosity.VERBOSE, "Also print versions, settings, times, and tracebacks of errors."
        ),
    ]


def _option(names: tuple[str, str], level: Verbosity, help: str) -> click.Option:
    def chosen(ctx: click.Context, parameter: click.Parameter, given: Any) -> None:
        if not given or ctx.resilient_parsing:
            return
        if _current not in (Verbosity.NORMAL, level):
            raise UserError("--quiet and --verbose: give one of them")
        _set(level)

    return click.Option(names, is_flag=True, expose_value=False, is_eager=True, callback=chosen, help=help)


def _set(level: Verbosity) -> None:
    global _current
    _current = level
