"""`python -m kvcal.calibrate` and the console script `calibrate`."""

from __future__ import annotations

import sys

_OF_THE_EXTRA = (
    *("accelerate", "altair", "click", "datasets", "faiss", "huggingface_hub", "jinja2", "matplotlib", "numpy", "rich"),
    *("sklearn", "threadpoolctl", "transformers", "vl_convert", "yaml"),
)
"""What the command line imports by name."""


def main() -> None:
    try:
        from .cli import cli

        cli(prog_name="calibrate")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _OF_THE_EXTRA:
            raise
        print(
            f"Error: {error.name} is not installed: the command line needs the extra: pip install 'kvcal[calibrate]' "
            "(or 'kvcal[gpu]')",
            file=sys.stderr,
        )
        sys.exit(2)


if __name__ == "__main__":
    main()
