"""Checkpoints that were converted from GGUF files, kept in the user's cache: $KVCAL_CACHE/gguf.

An entry is a folder named by the file's sha256 and by the versions of what read it, since another version may read
metadata that this one passed over. Its `checkpoint` appears whole or not at all, with the hashes of its files.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import stat
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...artifacts import KvcalError
from ...artifacts.locks import locked
from ...artifacts.plain_files import open_plain, read_plain
from ...artifacts.syncing import in_one_line, make_folder, reason
from ...artifacts.writing import new_folder
from ...runtime import hub
from .gguf_conversion import Progress, convert
from .gguf_file import MAGIC

RULES = 1
"""Version of this conversion; to be raised with every change of what it writes."""
_SUMS = "kvcal-gguf.json"
_CHECKPOINT = "checkpoint"
_PIECE = 1 << 22


def cache_folder() -> Path:
    """$KVCAL_CACHE, or `kvcal` in $XDG_CACHE_HOME or ~/.cache."""
    if folder := os.environ.get("KVCAL_CACHE"):
        return hub.path_of(folder)
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else hub.path_of("~/.cache")) / "kvcal"


def converted(pieces: Sequence[Path], name: str, progress: Progress | None = None) -> Path:
    """The checkpoint folder of a GGUF file, converted now unless it was before.

    One process converts, others that want the same file wait for it.

    Args:
        pieces: the file, or what it was cut into, in order.
        name: for people.
        progress: called as progress(done, total, note=...).

    Raises:
        KvcalError: not readable, no language model, of an architecture that transformers cannot read, or the cache
            cannot be written.
    """
    tell = progress or (lambda *_, **__: None)
    if importlib.util.find_spec("gguf") is None:
        raise KvcalError(f"{name}: reading it needs the package gguf: pip install 'kvcal[models]' (or gguf)")
    before = [_state(piece) for piece in pieces]
    entry = cache_folder().absolute() / "gguf" / _key(pieces, name)
    place = entry / _CHECKPOINT
    if _intact(place):
        return place
    try:
        make_folder(entry)
    except OSError as error:
        raise KvcalError(
            f"{name}: its converted copy cannot be kept in {entry.parent} ({reason(error)}): set KVCAL_CACHE to a "
            "folder that can be written"
        ) from error
    try:
        with in_one_line(entry), locked(entry, lambda: tell(0, None, "waiting: another process converts it")):
            if _intact(place):
                return place
            _remove(place)  # damaged
            _convert(pieces, name, place, tell)
            if [_state(piece) for piece in pieces] != before:
                _remove(place)
                raise KvcalError(f"{name}: was changed while it was read: try again when it is whole")
    except KvcalError:
        if not _intact(place):  # where there are no locks another process may have been quicker
            raise
    finally:
        with contextlib.suppress(OSError):
            entry.rmdir()  # fails, as it should, where something is in it
    return place


def _convert(pieces: Sequence[Path], name: str, place: Path, tell: Progress) -> None:
    from .gguf_checks import check_header
    from .gguf_header import read_header

    with new_folder(place) as building:
        source = building.parent / "source"
        source.mkdir()
        file = source / "model.gguf"
        if len(pieces) == 1:
            file.symlink_to(pieces[0])
        else:
            _join(pieces, file)
        header = read_header(file, name)
        check_header(header, name)
        _check_room(place.parent, 4 * sum(tensor.numbers for tensor in header.tensors))
        convert(source, file.name, header, name, building, tell)
        mode = (building / "config.json").stat().st_mode
        for path in building.iterdir():
            path.chmod(stat.S_IMODE(mode))  # safetensors writes files that only their owner can read
        sums = {path.name: _sum(path) for path in sorted(building.iterdir())}
        body = {"from": Path(name).name, "rules": RULES, "versions": _versions(), "files": sums}
        (building / _SUMS).write_text(json.dumps(body, indent=1))


def _remove(place: Path) -> None:
    """Raises OSError."""
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


def _versions() -> dict[str, str]:
    return {package: version(package) for package in ("gguf", "transformers")}


def _key(pieces: Sequence[Path], name: str) -> str:
    digest = hashlib.sha256()
    try:
        for index, piece in enumerate(pieces):
            with os.fdopen(open_plain(piece), "rb") as file:
                start = file.read(len(MAGIC))
                if index == 0 and start != MAGIC:
                    raise KvcalError(f"{name}: is not a GGUF file: fetch it again")
                digest.update(start)
                while chunk := file.read(_PIECE):
                    digest.update(chunk)
    except OSError as error:
        raise KvcalError(f"{name}: cannot be read ({error.strerror or error}): check the file") from None
    read_by = hashlib.sha256(json.dumps([RULES, _versions()]).encode()).hexdigest()
    return f"{digest.hexdigest()}-{read_by[:8]}"


def _intact(place: Path) -> bool:
    """Whether an entry has the files that were written, with their content."""
    try:
        sums = json.loads(read_plain(place / _SUMS, 1 << 20))["files"]
        names = {path.name for path in place.iterdir()}
        return names == {_SUMS, *sums} and all(_sum(place / name) == found for name, found in sums.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _sum(path: Path) -> str:
    digest = hashlib.sha256()
    with os.fdopen(open_plain(path), "rb") as file:
        while chunk := file.read(_PIECE):
            digest.update(chunk)
    return digest.hexdigest()


def _state(path: Path) -> Any:
    try:
        found = path.stat()
    except OSError as error:
        raise KvcalError(f"{path}: cannot be read ({error.strerror}): check the file") from None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _join(pieces: Sequence[Path], file: Path) -> None:
    with file.open("wb") as whole:
        for piece in pieces:
            with os.fdopen(open_plain(piece), "rb") as part:
                shutil.copyfileobj(part, whole, _PIECE)


def _check_room(folder: Path, needed: int) -> None:
    """Raise KvcalError, before the work, where the disk has not enough room.

    Args:
        needed: bytes of the weights as float32.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise KvcalError(
            f"{folder}: has {free / 1e9:.1f} GB of room, the converted model may take {needed / 1e9:.1f}: free some, "
            "or set KVCAL_CACHE to a folder that has"
        )
