"""The state of interrupted work on disk: tensors, and a JSON file that names them and whose appearance is the commit.

Both carry checksums, as a flipped bit in a sum would go into every number that is derived from it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..artifacts import KvcalError
from ..artifacts.locks import FileLock
from ..artifacts.plain_files import read_plain
from ..artifacts.syncing import in_one_line, make_folder
from ..artifacts.tensor_file import StageFile, TensorFile
from ..artifacts.workplace import Workplace


def write_state(commit: Path, stem: str, body: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write `tensors` to a new file STEM.HASH.safetensors beside `commit`, then `body` to `commit` in one step.

    Raises:
        KvcalError: the disk does not take it; the former state is still there.
    """
    with in_one_line(commit.parent):
        make_folder(commit.parent)
        with Workplace(commit.parent) as work:
            state = {"body": body, "tensors": dataclasses.asdict(work.place_tensors(stem, tensors))}
            work.sync()  # no state is named before it is on the disk
            work.place(work.write(json.dumps({**state, "sha256": _sha256(state)}).encode()), commit.name)
            work.confirm()


def read_state(commit: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(body, tensors).

    Raises:
        OSError, ValueError, LookupError, TypeError, ArtifactError: not there, or not what was written.
    """
    state = json.loads(read_plain(commit))
    stated = state.pop("sha256")
    if stated != _sha256(state):
        raise ValueError(f"{commit.name} is not what was written")
    file = StageFile(**state["tensors"])
    if Path(file.file).name != file.file:
        raise ValueError(f"{commit.name} names a file elsewhere")
    return state["body"], dict(TensorFile(commit.parent, file))


def remove_state(folder: Path, lock: FileLock) -> None:
    """Remove the states in a folder, unless another process has the lock, and is at work there."""
    if not folder.is_dir():
        return
    try:
        lock.acquire()
    except KvcalError:
        return
    shutil.rmtree(folder, ignore_errors=True)
    lock.release()


def _sha256(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
