"""The command line: `kvcal`, `calibrate` and `python -m kvcal` are this program."""

from __future__ import annotations

import sys


def main() -> None:
    try:
        from .cli import cli

        cli(prog_name="calibrate")
    except ModuleNotFoundError as error:
        from ..artifacts.packages import extra_of, missing

        package = (error.name or "").partition(".")[0]
        if extra_of(package) is None:
            raise
        print(f"Error: {missing(package, 'run this command')}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
