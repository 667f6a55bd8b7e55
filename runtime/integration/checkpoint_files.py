"""Files of a checkpoint's folder, read so that none leads out of it. Needs no transformers."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

from ...artifacts import KvcalError
from .checkpoint_json import PLAIN

_MOST_BYTES = 64 << 20


def shards(index: Path) -> list[str]:
    """The files that a `….index.json` names, which lie in its folder.

    Raises:
        KvcalError: no such file, or one that leads out of the folder.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise KvcalError(f"{index}: weight_map: expected a file for every weight: fetch it again")
    names = sorted(set(weight_map.values()))
    for name in names:
        if not all(PLAIN.fullmatch(part) and len(part) <= 255 for part in name.split("/")):
            raise KvcalError(f"{index}: {name[:200]!r}: expected a file in this folder: fetch it again")
        check_inside(index.parent, index.parent / name, name)
    return names


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds. Raises KvcalError: no such file, too large, or something else."""
    try:
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "is no plain file")  # a pipe would be waited for
        with path.open("rb") as file:
            text = file.read(_MOST_BYTES + 1)
        body = json.loads(text) if len(text) <= _MOST_BYTES else None
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise KvcalError(f"{path}: cannot be loaded ({reason}): fetch it again") from None
    if not isinstance(body, dict):
        raise KvcalError(f"{path}: cannot be loaded (a JSON object is expected): fetch it again")
    return body


def check_inside(folder: Path, path: Path, name: str) -> None:
    """Refuse a link out of the folder, except to the blobs of a Hub cache, whose snapshots are made of such links."""
    place = path.resolve()
    of_the_hub = place.parent.name == "blobs" and place.parent.parent.name.startswith(("models--", "datasets--"))
    if not (of_the_hub or place.is_relative_to(folder.resolve())):
        raise KvcalError(f"{folder}: {name} is a link out of this folder: give the folder that the file itself is in")
