"""`python -m kvcal.calibrate` and the console script `calibrate`."""

from __future__ import annotations

import sys


def main() -> None:
    try:
        from .cli import cli
    except ModuleNotFoundError as error:
        if error.name != "click":
            raise
        print(
            "Error: the command line needs the extra: pip install 'kvcal[calibrate]' (or 'kvcal[gpu]')", file=sys.stderr
        )
        sys.exit(2)
    cli(prog_name="calibrate")


if __name__ == "__main__":
    main()
