"""Where files are made before they take their places: what is half done is never seen."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from .errors import KvcalError
from .locks import try_lock
from .syncing import FOLDER, reason, sync_folder
from .tensor_file import StageFile, TensorFile

_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_WORKPLACE = re.compile(r"\.kvcal-[0-9a-f]{16}")


class Workplace:
    """A hidden folder in `folder`, on its file system, that is gone when the context ends.

    It is locked while this process lives, so that the next writer, even in another container, knows what a killed one
    left.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self) -> Workplace:
        self._folder = os.open(self.folder, FOLDER)
        try:
            self._remove_abandoned()
            work = None
            while work is None:  # a writer that tidies up at this moment may have taken it for abandoned
                self._name = f".kvcal-{secrets.token_hex(8)}"
                os.mkdir(self._name, 0o700, dir_fd=self._folder)
                work = self._claim(self._name, new=True)
            self._work = work
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
        """Write a new file in the workplace, on the disk when this returns; its name."""
        return self._write([content])

    def write_tensors(self, tensors: Mapping[str, Tensor]) -> str:
        """Write a new safetensors file in the workplace, likewise; its name. Same tensors, same bytes."""
        name, file = self._create()
        mode = stat.S_IMODE(os.fstat(file).st_mode)
        os.close(file)
        on_cpu = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        save_file(on_cpu, self.path / name)
        file = self._open(name)
        try:
            os.fchmod(file, mode)  # safetensors writes files that only their owner can read
            os.fsync(file)
        finally:
            os.close(file)
        return name

    def place_tensors(self, stem: str, tensors: Mapping[str, Tensor]) -> StageFile:
        """Write a safetensors file into the folder, under a name that no other content has; a file keeps its bytes."""
        name = self._write(tensors.chunks()) if isinstance(tensors, TensorFile) else self.write_tensors(tensors)
        digest, size = self._sha256(name)
        file = StageFile(f"{stem}.{digest[:8]}.safetensors", digest, size)
        self.place(name, file.file)
        return file

    def place(self, name: str, target: str) -> None:
        """Move `name` from the workplace to `target` in the folder, replacing what is there."""
        made = os.stat(name, dir_fd=self._work, follow_symlinks=False)
        if (mode := self._mode(target, made)) != stat.S_IMODE(made.st_mode):
            os.chmod(name, mode, dir_fd=self._work)
        try:
            os.rename(name, target, src_dir_fd=self._work, dst_dir_fd=self._folder)
        except OSError:
            if not self._is(target, made):  # a network file system may report that a rename failed which it has done
                raise

    def remove(self, name: str) -> None:
        """Remove a file of the folder."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._folder)

    def sync(self) -> None:
        """The folder's names are on the disk when this returns. Raises OSError."""
        sync_folder(self._folder)

    def confirm(self) -> None:
        """`sync` after a change that cannot be taken back any more. Raises KvcalError."""
        try:
            self.sync()
        except OSError as error:
            raise KvcalError(
                f"{self.folder}: was written, but the disk does not confirm it ({reason(error)}): check the disk"
            ) from error

    def _write(self, chunks: Iterable[bytes]) -> str:
        name, file = self._create()
        try:
            for chunk in chunks:
                unwritten = memoryview(chunk)
                while unwritten:
                    unwritten = unwritten[os.write(file, unwritten) :]
            os.fsync(file)
        finally:
            os.close(file)
        return name

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

    def _mode(self, target: str, made: os.stat_result) -> int:
        """Mode of a file that replaces another: what the owner of that one has closed to others stays closed."""
        mode = stat.S_IMODE(made.st_mode)
        try:
            replaced = os.stat(target, dir_fd=self._folder, follow_symlinks=False)
        except OSError:  # there is none yet
            return mode
        both_files = stat.S_ISREG(replaced.st_mode) and stat.S_ISREG(made.st_mode)
        return mode & replaced.st_mode if both_files else mode

    def _claim(self, name: str, new: bool = False) -> int | None:
        """A locked descriptor of a workplace; None: it is another's, or gone. Raises OSError.

        Args:
            new: this process has just made it, and uses it without a lock where the file system has no locks.
        """
        try:
            work = os.open(name, FOLDER | os.O_NOFOLLOW, dir_fd=self._folder)
        except FileNotFoundError:
            return None
        try:
            ours = try_lock(work)
            if (ours or (new and ours is None)) and self._is(name, os.fstat(work)):
                kept, work = work, -1
                return kept
        finally:
            if work >= 0:
                os.close(work)
        return None

    def _remove_abandoned(self) -> None:
        for name in os.listdir(self._folder):  # noqa: PTH208 (a descriptor has no path)
            if _WORKPLACE.fullmatch(name):
                with contextlib.suppress(OSError):  # one that may still be in use stays
                    work = self._claim(name)
                    if work is not None:
                        shutil.rmtree(self.folder / name, ignore_errors=True)
                        os.close(work)
