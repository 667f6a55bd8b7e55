"""Locks between processes, in all containers of a machine: the kernel keeps them, so they end with their process."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import KvcalError
from .writing import in_one_line, make_folder


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One writer at a time; waits for the one before. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


class FileLock:
    """Keeps other processes from long work, by a file that is made, with its folder, when it is not there."""

    def __init__(self, path: Path):
        self.path = path
        self._file: int | None = None

    def acquire(self) -> None:
        """Does nothing when it is ours already.

        Raises:
            KvcalError: another process has it, or the file cannot be made.
        """
        if self._file is not None:
            return
        with in_one_line(self.path):
            make_folder(self.path.parent)
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._file = file
            except BlockingIOError:
                place = self.path.parent
                raise KvcalError(f"{place}: another process works on this now: wait until it has ended") from None
            finally:
                if self._file is None:
                    os.close(file)

    def release(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None
