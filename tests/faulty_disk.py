"""A disk for what `kvcal.artifacts` writes on which one call fails, is interrupted, or is the last before a crash.

After a crash a folder has, of every name, what it was at its last sync or what it became since, and a file what it
held at its last sync. That is all that POSIX promises.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kvcal.artifacts import locks, syncing, workplace

COUNTED = ("mkdir", "open", "write", "fsync", "rename", "unlink", "chmod", "fchmod")
MOST_STATES = 32
"""Looked at after each crash: all that there can be, or so many drawn ones, none and all of the changes among them."""

Tree = dict[str, Any]
"""name -> content of a file, or a Tree."""


class Crash(BaseException):
    """Nothing of the process runs on."""


@dataclass(frozen=True)
class Fault:
    call: int
    """Number of the call that it comes with, from 0."""
    after: bool
    """Whether the call is carried out."""
    kind: type[BaseException]


def faults(calls: int) -> Iterator[Fault]:
    """All that can come with so many calls."""
    for call in range(calls):
        for after in (False, True):
            for kind in (OSError, KeyboardInterrupt, Crash):
                yield Fault(call, after, kind)


class FaultyDisk:
    """Stands in for `os`, `shutil.rmtree` and `save_file` of the modules that write."""

    def __init__(self, root: Path, fault: Fault | None = None):
        self.root = root
        self.fault = fault
        self.calls = 0
        self.crashed: list[Tree] = []
        """Trees that may be found after the crash."""
        self._synced = {}  # inode of a folder -> name -> inode
        self._content = {}  # inode of a file -> bytes
        for folder, _, files in os.walk(root):
            self._synced[Path(folder).stat().st_ino] = self._listing(folder)
            for name in files:
                path = Path(folder, name)
                self._content[path.stat().st_ino] = path.read_bytes()

    @contextmanager
    def in_use(self) -> Iterator[FaultyDisk]:
        with pytest.MonkeyPatch.context() as patch:
            for module in (locks, syncing, workplace):
                patch.setattr(module, "os", self)
            patch.setattr(workplace, "save_file", self._counted(workplace.save_file))
            patch.setattr(workplace, "shutil", _Removing(self._counted(shutil.rmtree)))
            yield self

    def __getattr__(self, name: str) -> Any:
        found = getattr(os, name)
        return self._counted(self._fsync if name == "fsync" else found) if name in COUNTED else found

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **more: Any) -> Any:
            if self.crashed:
                raise Crash
            here = self.fault is not None and self.calls == self.fault.call
            self.calls += 1
            if here and not self.fault.after:
                self._strike(errno.EIO)
            result = call(*args, **more)
            if here and self.fault.after:
                if call is os.open:
                    os.close(result)
                self._strike(errno.ESTALE)
            return result

        return run

    def _strike(self, number: int) -> None:
        if self.fault.kind is OSError:
            raise OSError(number, os.strerror(number))
        if self.fault.kind is Crash:
            self.crashed = list(self._survivors())
        raise self.fault.kind

    def _fsync(self, handle: int) -> None:
        status = os.fstat(handle)
        if stat.S_ISDIR(status.st_mode):
            self._synced[status.st_ino] = self._listing(handle)
        else:
            self._content[status.st_ino] = Path(f"/proc/self/fd/{handle}").read_bytes()

    def _now(self) -> dict[int, dict[str, int]]:
        return {Path(folder).stat().st_ino: self._listing(folder) for folder, _, _ in os.walk(self.root)}

    def _survivors(self) -> Iterator[Tree]:
        now = self._now()
        changes = [
            (folder, name)
            for folder, after in now.items()
            for name in sorted(after.keys() | self._synced.get(folder, {}).keys())
            if after.get(name) != self._synced.get(folder, {}).get(name)
        ]
        every = 2 ** len(changes)
        drawn = random.Random(self.fault.call).sample(range(every), min(every, MOST_STATES))
        for number in sorted({0, every - 1, *drawn}):
            made = {change for bit, change in enumerate(changes) if number >> bit & 1}
            yield self._survivor(self.root.stat().st_ino, now, made)

    def _survivor(self, folder: int, now: dict[int, dict[str, int]], made: set[tuple[int, str]]) -> Tree:
        before = self._synced.get(folder, {})
        after = now.get(folder, before)
        tree: Tree = {}
        for name in sorted(before.keys() | after.keys()):
            found = (after if (folder, name) in made else before).get(name)
            if found is not None:
                is_folder = found in now or found in self._synced
                tree[name] = self._survivor(found, now, made) if is_folder else self._content.get(found, b"")
        return tree

    @staticmethod
    def _listing(folder: Any) -> dict[str, int]:
        with os.scandir(folder) as entries:
            return {entry.name: entry.inode() for entry in entries}


class _Removing:
    """`shutil`, whose errors are ignored where they are asked to be."""

    def __init__(self, rmtree: Callable[..., Any]):
        self._rmtree = rmtree

    def rmtree(self, path: Path, ignore_errors: bool) -> None:
        with contextlib.suppress(*[OSError] * ignore_errors):
            self._rmtree(path, ignore_errors=ignore_errors)


def read_tree(folder: Path) -> Tree:
    return {
        path.name: read_tree(path) if path.is_dir() and not path.is_symlink() else path.read_bytes()
        for path in folder.iterdir()
    }


def write_tree(folder: Path, tree: Tree) -> None:
    for name, content in tree.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            (folder / name).mkdir()
            write_tree(folder / name, content)
