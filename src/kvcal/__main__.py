"""`python -m kvcal`, and the commands `kvcal` and `calibrate`, which are the same program."""

from .calibrate.__main__ import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
