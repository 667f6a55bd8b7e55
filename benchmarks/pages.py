"""Every page of results, from the data in benchmarks/results.

    python -m benchmarks.pages            # writes all of docs/results, and docs/architectures.md
    python -m benchmarks.pages --check    # says which is older than its data or its template, and ends with 1

A figure is drawn again only where its data changed; delete it to have it drawn anew.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .architectures.page import PAGE as ARCHITECTURES
from .cpu.page import PAGE as CPU
from .demo.page import PAGE as DEMO
from .gpu.page import PAGE as GPU
from .real.page import PAGE as REAL
from .scale.page import PAGE as SCALE
from .shared.lookup import NotMeasured
from .shared.places import PAGES, RESULTS

ALL = (REAL, CPU, GPU, SCALE, ARCHITECTURES, DEMO)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pages", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(arguments)
    try:
        if not options.check:
            for page in ALL:
                page.write(RESULTS, PAGES)
        old = [name for page in ALL for name in page.older(RESULTS, PAGES)]
    except NotMeasured as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if old:
        print(f"error: older than data or template: {', '.join(old)}: run python -m benchmarks.pages", file=sys.stderr)
    return 1 if old else 0


if __name__ == "__main__":
    sys.exit(main())
