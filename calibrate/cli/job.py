"""A command that several processes run together, and that looks to the user like one."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...artifacts import KvcalError
from .interrupted import signal_of

if TYPE_CHECKING:
    from ..distributed import World


def one_job(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command its `world`. Of several processes only rank 0 prints, and only one says why they failed."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> Any:
        from ..distributed import SINGLE, launched

        if launched() == 1:
            return command(*args, world=SINGLE, **options)
        return _together(lambda world: command(*args, world=world, **options))

    run.shares_work = True  # type: ignore[attr-defined]
    return run


def alone(command: click.Command) -> click.Command:
    """The command, which refuses to be run by several processes unless it shares its work among them."""
    callback = command.callback
    if callback is None or hasattr(callback, "shares_work"):
        return command

    def refuse(world: World) -> None:
        raise KvcalError(f"calibrate {command.name} runs in one process, {world.size} were started: drop torchrun")

    @functools.wraps(callback)
    def run(*args: Any, **options: Any) -> Any:
        from ..distributed import launched

        return callback(*args, **options) if launched() == 1 else _together(refuse)

    run.shares_work = False  # type: ignore[attr-defined]
    command.callback = run
    return command


def _together(work: Callable[[World], Any]) -> None:
    from ..distributed import Finished, join

    world = join()
    streams = sys.stdout, sys.stderr
    if not world.first:
        sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 (until the process ends)
    try:
        with contextlib.suppress(Finished):
            world.agree_on(_described())
            work(world)
        world.leave()
    except BaseException as error:
        if not world.claim():
            # Told already; nothing may keep a failed job from ending.
            number = signal_of(error)
            os._exit(2 if number is None else 128 + number)
        sys.stdout, sys.stderr = streams
        raise


def _described() -> dict[str, str]:
    """All that the ranks of a job must have in common, in the words of the command line."""
    from ..one_pass import versions

    context = click.get_current_context()
    options = {name.replace("_", "-"): _plain(value) for name, value in context.params.items()}
    return {"command": str(context.info_name), **options, **{f"version of {n}": v for n, v in versions().items()}}


def _plain(value: Any) -> str:
    if isinstance(value, Path):
        return str(value.absolute())
    if isinstance(value, tuple):
        return ", ".join(map(_plain, value))
    return re.sub(r"^cuda:\d+$", "cuda", str(value))  # without torchrun each rank may be given its own
