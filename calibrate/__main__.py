"""The command line: `kvcal`, `calibrate` and `python -m kvcal` are this program."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from .interrupts import raise_on_signals, raised_on


def main() -> None:
    try:
        if "WORLD_SIZE" not in os.environ:  # torchrun ends its processes itself, also those that wait for others
            raise_on_signals()
        from .cli import cli

        cli(prog_name=_called())
    except SystemExit:
        raise
    except BaseException as error:
        number = raised_on() or (signal.SIGINT if isinstance(error, KeyboardInterrupt) else None)
        if number is not None:  # before there was a command that says what is kept
            print("Error: interrupted: nothing was begun", file=sys.stderr)
            sys.exit(128 + number)
        from ..artifacts.packages import extra_of, missing

        package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
        extra = extra_of(package)
        if extra is None:
            raise
        whole = "calibrate" if extra == "transformers" else extra  # which commands need besides
        print(f"Error: {missing(package, 'run this command', whole)}", file=sys.stderr)
        sys.exit(2)


def _called() -> str:
    """The name by which the user called us: completion and usage lines go by it."""
    path = Path(sys.argv[0])
    if path.name == "__main__.py":
        return "python -m kvcal" if path.parent.name == "kvcal" else "python -m kvcal.calibrate"
    return path.name.removesuffix(".exe") or "calibrate"


if __name__ == "__main__":
    main()
