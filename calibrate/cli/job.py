"""A command that several processes run together, and that looks to the user like one."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..distributed import SINGLE, Finished, join, launched


def one_job(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command its `world`. Of several processes rank 0 alone prints, and one alone says why they fail."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> Any:
        if launched() == 1:
            return command(*args, world=SINGLE, **options)
        world = join()
        streams = sys.stdout, sys.stderr
        if not world.first:
            sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 (until the process ends)
        try:
            with contextlib.suppress(Finished):
                command(*args, world=world, **options)
            world.leave()
        except BaseException:
            if not world.claim():
                os._exit(2)  # told already; nothing may keep a failed job from ending
            sys.stdout, sys.stderr = streams
            raise

    return run
