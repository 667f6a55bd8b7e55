"""Locks between processes, in all containers of a machine: the kernel keeps them, so they end with their process.

A file system that has no locks is written to without them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import KvcalError
from .syncing import FOLDER, in_one_line, make_folder

_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, errno.EBADF)
"""Error numbers of file systems that have no locks; EBADF is what some network ones answer for a folder."""


def try_lock(handle: int) -> bool | None:
    """Lock an open file or folder: True: it is ours; False: it is another's; None: there are no locks here.

    Raises:
        OSError: anything else.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


@contextmanager
def locked(folder: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the lock of a folder: one writer at a time, the next one waits. Raises OSError.

    Args:
        waiting: called before it waits.
    """
    handle = os.open(folder, FOLDER)
    try:
        if try_lock(handle) is False:
            if waiting is not None:
                waiting()
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        with contextlib.suppress(OSError):  # a failure to close says nothing about what was written
            os.close(handle)


class FileLock:
    """Keeps other processes from long work, by a lock file that is made, with its folder, when it is not there."""

    def __init__(self, path: Path):
        self.path = path
        self._file: int | None = None

    def acquire(self) -> None:
        """Take the lock, unless this process has it already.

        Raises:
            KvcalError: another process has it, or the file cannot be made.
        """
        while self._file is None:
            with in_one_line(self.path):
                make_folder(self.path.parent)
                file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
                try:
                    if try_lock(file) is False:
                        place = self.path.parent
                        raise KvcalError(f"{place}: another process works on this now: wait until it has ended")
                    if self._is_at_its_path(file):
                        self._file = file
                finally:
                    if self._file is None:
                        os.close(file)

    def release(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _is_at_its_path(self, file: int) -> bool:
        """False where the former holder has removed the file: others would then lock a new one."""
        try:
            return os.path.samestat(self.path.lstat(), os.fstat(file))
        except FileNotFoundError:
            return False
