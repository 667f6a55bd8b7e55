"""Get names and contents onto the disk, and say in one line why that failed."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .errors import KvcalError

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
"""Flags to open a folder with."""
_NO_SUCH_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
"""Error numbers of file systems that cannot sync a folder."""


def sync_folder(handle: int) -> None:
    """The names in an open folder are on the disk when this returns. Raises OSError."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_SUCH_SYNC:
            raise


def sync_tree(folder: Path) -> None:
    """Everything in a folder is on the disk when this returns, itself last. Raises OSError."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in [*names, "."]:
            handle = os.open(Path(place) / name, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(handle) if name != "." else sync_folder(handle)
            finally:
                os.close(handle)


def make_folder(folder: Path) -> None:
    """Make a folder and those that it is to lie in; they are on the disk when this returns. Raises OSError."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)  # another process may have made it; a file of that name raises
    parent = os.open(folder.parent, FOLDER)
    try:
        sync_folder(parent)
    finally:
        os.close(parent)


@contextmanager
def in_one_line(place: Path) -> Iterator[None]:
    """Turn what keeps a file or folder from being written into a KvcalError of one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise KvcalError(f"{place}: cannot be written ({reason(error)}); nothing was changed there") from error


def reason(error: Exception) -> str:
    if isinstance(error, OSError):
        hint = ": free some space and try again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        return f"{error.strerror or error}{hint}"
    return str(error)
