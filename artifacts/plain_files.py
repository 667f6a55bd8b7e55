"""Read files that a stranger may have sent: plain ones only, so that no link leads out of their folder."""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path

_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # not blocking: a pipe would be waited for
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_HUB_BLOB = re.compile(r"\.\./\.\./blobs/([0-9a-f]{40}|[0-9a-f]{64})")


def open_plain(path: Path) -> int:
    """A descriptor of a plain file, for reading; the caller closes it.

    The Hub's cache keeps its snapshots as links to `../../blobs/HASH`: these are followed, to a plain file there.

    Raises:
        OSError: not there, not to be read, or a link, folder, pipe or device.
    """
    try:
        file = os.open(path, _FLAGS)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EMLINK):  # what opening a link gives on Linux and macOS, and on BSD
            raise
        file = _open_blob(path)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "is no plain file", os.fspath(path))
    return file


def read_plain(path: Path, most: int | None = None) -> bytes:
    """The content of a plain file. Raises OSError as `open_plain`, and for one larger than `most` bytes."""
    with open(open_plain(path), "rb") as file:
        content = file.read() if most is None else file.read(most + 1)
    if most is not None and len(content) > most:
        raise OSError(errno.EFBIG, f"is larger than {most} bytes", os.fspath(path))
    return content


def _open_blob(link: Path) -> int:
    blob = _HUB_BLOB.fullmatch(os.fspath(link.readlink()))
    try:
        if blob is not None:
            folder = os.open(os.path.join(link.parent, "..", "..", "blobs"), _FOLDER)  # noqa: PTH118 (Path keeps no "..")
            try:
                return os.open(blob[1], _FLAGS, dir_fd=folder)
            finally:
                os.close(folder)
    except FileNotFoundError:  # a download that did not end
        raise
    except OSError:
        pass
    raise OSError(errno.ELOOP, "is a link, where a plain file is expected", os.fspath(link))
