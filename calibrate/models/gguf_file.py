"""Which files are GGUF files that can be read: by their first bytes and their names."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from ...artifacts import KvcalError
from ...artifacts.plain_files import open_plain

MAGIC = b"GGUF"
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)


def gguf_in(folder: Path) -> list[Path]:
    """The GGUF files of a folder, without image encoders (`mmproj…`). Raises KvcalError: not readable."""
    try:
        found = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".gguf")
    except OSError as error:
        raise KvcalError(f"{folder}: cannot be read ({error.strerror}): check who may") from None
    return [path for path in found if not path.name.lower().startswith("mmproj")]


def plain_gguf(path: Path, name: str, named: bool = True) -> Path:
    """The file itself, absolute.

    Args:
        name: for people.
        named: the user gave this path, which may be a link; links in a folder may be a stranger's, and only those of
            the Hub's cache are followed.

    Raises:
        KvcalError: not a file, not readable, of another format, or a part of a split model.
    """
    try:
        place = Path(os.path.realpath(path)) if named else path
        if not stat.S_ISREG(place.stat().st_mode):
            raise KvcalError(f"{name}: is no plain file: give a GGUF file, or the folder of a checkpoint")
        with os.fdopen(open_plain(place), "rb") as file:
            start = file.read(64)
    except OSError as error:
        raise KvcalError(f"{name}: cannot be read ({error.strerror or error}): check the file") from None
    _check_start(start, name)
    part = _PART.search(place.name)
    if part and int(part[2]) > 1:
        raise split_file(name, f"part {int(part[1])} of {int(part[2])}")
    return Path(os.path.realpath(place))


def split_file(name: str, which: str) -> KvcalError:
    return KvcalError(
        f"{name}: is {which} of a split GGUF: join them with llama.cpp's `llama-gguf-split --merge FIRST_PART "
        "WHOLE.gguf` and give that"
    )


def _check_start(start: bytes, name: str) -> None:
    if start.startswith(MAGIC):
        return
    if start.startswith(b"version https://git-lfs"):
        raise KvcalError(f"{name}: is a pointer of Git LFS, not the file itself: fetch it with `git lfs pull`")
    if name.lower().endswith(".gguf"):
        what = f"begins with {start[:4]!r}" if start else "is empty"
        raise KvcalError(f"{name}: is not a GGUF file ({what}, {MAGIC!r} is expected): fetch it again")
    raise KvcalError(f"{name}: is a file: give the folder of the checkpoint, or a GGUF file")
