"""What calibration and prompts cost on a CPU, as ratios within one run.

    python -m benchmarks.scale calibration              # 10 minutes: over a forward pass, memory, PCA; --quick: one
    python -m benchmarks.scale processes                # minutes: two processes beside one, bytes of state
    python -m benchmarks.scale prefill MODEL ARTIFACT   # a prompt of 7680 tokens, and the first token after it

Each has its own --help.
"""

from __future__ import annotations

import sys
from importlib import import_module

from kvcal.artifacts import KvcalError

PARTS = ("calibration", "processes", "prefill")


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in PARTS:
        print(__doc__, file=sys.stdout if arguments[:1] == ["--help"] else sys.stderr)
        return 0 if arguments[:1] == ["--help"] else 2
    import_module(f".{arguments[0]}", __package__).main(arguments[1:])
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KvcalError as error:
        sys.exit(f"error: {error}")
