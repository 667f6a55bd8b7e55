"""Check, before any work, that a file or folder can be written at a place."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path

from .errors import KvcalError

_LONGEST_ADDED = ".partial-of-1024"
"""As long as any ending that is added to a name, for what stands beside it while work is going on."""


def check_new_folder(path: Path) -> None:
    """Check that a folder can appear at `path`; one that is there and is not empty is the caller's business.

    Raises:
        KvcalError: it cannot: what is in the way, or what the file system says.
    """
    _check_name(path)
    if not _look(path):
        _check_creatable(path)
    elif path.is_symlink() and (not path.exists() or (path.is_dir() and not any(path.iterdir()))):
        raise KvcalError(f"{path}: is a link, in whose place no folder can appear: give the place that it leads to")
    elif not path.is_dir():
        raise KvcalError(f"{path}: is no folder: give the name of one that can be made")
    elif not any(path.iterdir()):
        if path.is_mount() or path.absolute() == Path.cwd():
            raise KvcalError(f"{path}: is in use as a folder, and cannot appear at once: give a name in it")
        _check_creatable(path)


def check_new_file(path: Path, replaceable: Callable[[Path], bool] | None = None, what: str = "") -> None:
    """Check that a file can be written to `path`, in a folder that is there.

    Args:
        replaceable: tells by its content whether a file that is there may be replaced; None: it may not.
        what: a file that may be replaced, e.g. "a PNG file", for the error.

    Raises:
        KvcalError: it cannot, or another file would be lost.
    """
    _check_name(path)
    found = _look(path)
    if not path.parent.is_dir():
        raise KvcalError(f"{path}: {path.parent} is not a folder: make it first")
    if found is None:
        _check_creatable(path)
        return
    if stat.S_ISLNK(found.st_mode):
        raise KvcalError(f"{path}: is a link: give the file that it leads to")
    if not stat.S_ISREG(found.st_mode):
        raise KvcalError(f"{path}: is no plain file: choose another name")
    if replaceable is None:
        raise KvcalError(f"{path}: already exists: choose another name or remove it")
    if not os.access(path, os.R_OK | os.W_OK):
        raise KvcalError(f"{path}: is there and protected: choose another name")
    if not replaceable(path):
        raise KvcalError(f"{path}: is there and not {what}, and would be lost: choose another name or remove it")
    _check_creatable(path)


def check_can_write_in(folder: Path, *names: str) -> None:
    """Check that files of these names can be made in a folder that is there. Raises KvcalError when they cannot."""
    probe = folder / f".kvcal-try-{secrets.token_hex(8)}"
    try:
        probe.mkdir()
        try:
            for name in names:
                (probe / name).mkdir()
                (probe / name).rmdir()
        finally:
            probe.rmdir()
    except (OSError, ValueError) as error:
        shown = folder / names[-1].removesuffix(_LONGEST_ADDED) if names else folder
        reason = getattr(error, "strerror", None) or error
        raise KvcalError(f"{shown}: cannot be written ({reason}): choose another place") from None


def _check_name(path: Path) -> None:
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        raise KvcalError(f"{path}: its name is not UTF-8: choose another name") from None
    if path.name == ".." or path == path.parent != Path():
        raise KvcalError(f"{path}: has no name of its own: give one that does not end in a folder's dots")


def _look(path: Path) -> os.stat_result | None:
    """What is at `path`, links not followed; None: nothing."""
    try:
        return path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise KvcalError(f"{str(path)[:500]}: cannot be written ({reason}): choose another place") from None


def _check_creatable(path: Path) -> None:
    """Check that `path` can be made, with the folders above it that are not there yet."""
    path = path.absolute()
    missing = [f"{path.name}{_LONGEST_ADDED}"]
    for folder in path.parents:
        if _look(folder) is not None or folder == folder.parent:
            break
        missing.append(folder.name)
    if ".." in missing:
        raise KvcalError(f"{path}: leads through a folder that is not there: leave the dots out")
    if not folder.is_dir():
        raise KvcalError(f"{path}: {folder} is not a folder: choose another place")
    longest = os.pathconf(folder, "PC_PATH_MAX")
    if len(os.fsencode(path)) + 64 > longest:
        raise KvcalError(f"{str(path)[:500]}: is longer than a path can be ({longest} bytes): choose another place")
    check_can_write_in(folder, *reversed(missing))
