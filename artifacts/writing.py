"""Write files so that an interruption, a full disk or a crash of the machine leaves the old state or the new one.

Everything is made in a workplace: a hidden folder beside its place, of a name that nobody can guess, that only we may
enter. There it is synced; one rename puts it into its place.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .errors import KvcalError
from .signals import signals_held
from .tensor_file import StageFile

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_WORKPLACE = re.compile(r"\.kvcal-[0-9a-f]{16}")
_NO_SUCH_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
"""What file systems answer that cannot sync a folder."""


class Workplace:
    """A hidden folder in `folder`, on its file system, that is gone when the context ends.

    It is locked while we live. So the next writer knows what a killed one left, also from another container.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self) -> Workplace:
        self._folder = os.open(self.folder, _FOLDER)
        try:
            self._remove_abandoned()
            self._work = -1
            while self._work < 0:
                self._name = f".kvcal-{secrets.token_hex(8)}"
                os.mkdir(self._name, 0o700, dir_fd=self._folder)
                self._work = self._claim(self._name)
        except BaseException:
            os.close(self._folder)
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            shutil.rmtree(self.path, ignore_errors=True)
        finally:
            os.close(self._work)
            os.close(self._folder)

    @property
    def path(self) -> Path:
        return self.folder / self._name

    def write(self, content: bytes) -> str:
        """A new file in the workplace, on the disk; its name."""
        name, file = self._create()
        try:
            left = memoryview(content)
            while left:
                left = left[os.write(file, left) :]
            os.fsync(file)
        finally:
            os.close(file)
        return name

    def write_tensors(self, tensors: Mapping[str, Tensor]) -> str:
        """A new safetensors file in the workplace, on the disk; its name. Same tensors, same bytes."""
        name, file = self._create()
        mode = stat.S_IMODE(os.fstat(file).st_mode)
        os.close(file)
        here = {each: tensor.detach().cpu().contiguous() for each, tensor in tensors.items()}
        save_file(here, self.path / name)
        file = self._open(name)
        try:
            os.fchmod(file, mode)  # safetensors writes files that only their owner can read
            os.fsync(file)
        finally:
            os.close(file)
        return name

    def place_tensors(self, stem: str, tensors: Mapping[str, Tensor]) -> StageFile:
        """A safetensors file in the folder, of a name that no other content has."""
        name = self.write_tensors(tensors)
        digest, size = self._sha256(name)
        file = StageFile(f"{stem}.{digest[:8]}.safetensors", digest, size)
        self.place(name, file.file)
        return file

    def place(self, name: str, target: str) -> None:
        """Give what is called `name` in the workplace the name `target` in the folder, in the place of what has it."""
        made = os.stat(name, dir_fd=self._work, follow_symlinks=False)
        with contextlib.suppress(OSError):  # there is none yet
            there = os.stat(target, dir_fd=self._folder, follow_symlinks=False)
            if stat.S_ISREG(there.st_mode) and stat.S_ISREG(made.st_mode):
                os.chmod(name, stat.S_IMODE(there.st_mode), dir_fd=self._work)
        try:
            os.rename(name, target, src_dir_fd=self._work, dst_dir_fd=self._folder)
        except OSError:
            if not self._is(target, made):  # a network file system may report a failure of what it has done
                raise

    def remove(self, name: str) -> None:
        """Remove a file of the folder."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._folder)

    def sync(self) -> None:
        """The folder's names are on the disk when this returns. Raises OSError."""
        _sync(self._folder)

    def confirm(self) -> None:
        """`sync` for what cannot be taken back any more. Raises KvcalError."""
        try:
            self.sync()
        except OSError as error:
            raise KvcalError(
                f"{self.folder}: was written, but the disk does not confirm it ({reason(error)}): check the disk"
            ) from error

    def _create(self) -> tuple[str, int]:
        name = secrets.token_hex(8)
        return name, os.open(name, _NEW_FILE, 0o666, dir_fd=self._work)

    def _open(self, name: str) -> int:
        return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._work)

    def _sha256(self, name: str) -> tuple[str, int]:
        """(hash, bytes) of a file in the workplace."""
        digest, size, file = hashlib.sha256(), 0, self._open(name)
        try:
            while chunk := os.read(file, 1 << 22):
                digest.update(chunk)
                size += len(chunk)
        finally:
            os.close(file)
        return digest.hexdigest(), size

    def _is(self, target: str, made: os.stat_result) -> bool:
        try:
            return os.path.samestat(os.stat(target, dir_fd=self._folder, follow_symlinks=False), made)
        except OSError:
            return False

    def _claim(self, name: str) -> int:
        """A locked descriptor of a workplace; -1 when it is another's, or gone."""
        try:
            work = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=self._folder)
        except OSError:
            return -1
        try:
            fcntl.flock(work, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self._is(name, os.fstat(work)):
                return work
        except OSError:
            pass
        except BaseException:
            os.close(work)
            raise
        os.close(work)
        return -1

    def _remove_abandoned(self) -> None:
        for name in os.listdir(self._folder):  # noqa: PTH208 (a descriptor has no path)
            if _WORKPLACE.fullmatch(name) and (work := self._claim(name)) >= 0:
                shutil.rmtree(self.folder / name, ignore_errors=True)
                os.close(work)


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
            _sync_tree(building)
            with signals_held():
                work.place(building.name, target.name)
            work.confirm()


def make_folder(folder: Path) -> None:
    """Make a folder and those that it is to lie in; they are on the disk when this returns. Raises OSError."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    with contextlib.suppress(FileExistsError):
        folder.mkdir()
    parent = os.open(folder.parent, _FOLDER)
    try:
        _sync(parent)
    finally:
        os.close(parent)


@contextmanager
def in_one_line(place: Path) -> Iterator[None]:
    """What keeps a file or folder from being written, as a line of ours."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise KvcalError(f"{place}: cannot be written ({reason(error)}); nothing was changed there") from error


def reason(error: Exception) -> str:
    if isinstance(error, OSError):
        hint = ": free some space and try again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        return f"{error.strerror or error}{hint}"
    return str(error)


def has_content(folder: Path) -> bool:
    """Whether something is at `folder` that writing there would destroy: anything but an empty folder."""
    if not os.path.lexists(folder):
        return False
    return folder.is_symlink() or not folder.is_dir() or any(folder.iterdir())


def _sync(handle: int) -> None:
    """Of a folder."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_SUCH_SYNC:
            raise


def _sync_tree(folder: Path) -> None:
    """Everything in a folder is on the disk when this returns, itself last."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in [*names, "."]:
            handle = os.open(Path(place) / name, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(handle) if name != "." else _sync(handle)
            finally:
                os.close(handle)
