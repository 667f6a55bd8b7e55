"""Write files so that an interruption, a full disk or a crash of the machine leaves the old state or the new one.

Everything is made in a workplace: a hidden folder beside its place, of a name that nobody can guess, that only its
owner may enter. There it is synced; one rename puts it into its place.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from .errors import KvcalError
from .signals import signals_held
from .syncing import in_one_line, make_folder, sync_tree
from .workplace import Workplace


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content` in one step.

    Raises:
        KvcalError: the disk does not take it; what was there is still there.
    """
    with in_one_line(path), Workplace(path.parent) as work:
        work.place(work.write(content), path.name)
        work.confirm()


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Replace `path` by a safetensors file in one step. Raises KvcalError as above."""
    with in_one_line(path), Workplace(path.parent) as work:
        work.place(work.write_tensors(tensors), path.name)
        work.confirm()


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to build in, which becomes `folder` when the context ends without an exception.

    Raises:
        KvcalError: something is at `folder`, or the disk does not take it; nothing is at `folder` then.
    """
    target = folder.absolute()
    with in_one_line(folder):
        if has_content(folder):
            raise KvcalError(f"{folder}: already exists: choose another --output or remove it")
        make_folder(target.parent)
        with Workplace(target.parent) as work:
            building = work.path / "new"
            building.mkdir()
            yield building
            sync_tree(building)
            with signals_held():
                work.place(building.name, target.name)
            work.confirm()


def has_content(folder: Path) -> bool:
    """Whether something is at `folder` that writing there would destroy: anything but an empty folder."""
    if not os.path.lexists(folder):
        return False
    return folder.is_symlink() or not folder.is_dir() or any(folder.iterdir())
