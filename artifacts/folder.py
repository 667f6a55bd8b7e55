"""Artifacts on disk: written as if interrupted, read as if sent by a stranger.

Stage files carry the start of their hash in their name, so replacing a stage never touches a file
that the current manifest names; renaming the new manifest into place is the commit.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import glob
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .artifact import Artifact, Stage
from .errors import ArtifactError, KvcalError
from .manifest import FILE_NAME, MANIFEST, StageFile, read_manifest, write_manifest
from .schema import Header, check_stage
from .stage_settings import check_settings
from .values import check_values


class StageTensors(Mapping[str, Tensor]):
    """The tensors of a stage file, read one by one when asked for."""

    def __init__(self, folder: Path, file: StageFile, names: tuple[str, ...]):
        self.folder = folder
        self.file = file
        self._names = names

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.folder / self.file.file, framework="pt") as tensors:
            if name not in self._names:
                raise KeyError(name)
            return tensors.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def load(folder: str | os.PathLike[str]) -> Artifact:
    """Open an artifact after checking manifest, schema, shapes and hashes of every stage.

    Raises:
        ArtifactError: anything that does not hold, in one line.
    """
    folder = Path(folder)
    artifact, files, settings = read_manifest(folder)
    stages = {}
    for name, file in files.items():
        path = folder / file.file
        _check_bytes(path, file)
        header = _read_header(path)
        check_stage(str(path), name, header, artifact.layers)
        check_settings(str(folder / MANIFEST), name, settings[name], len(artifact.layers))
        stages[name] = Stage(StageTensors(folder, file, tuple(header)), settings[name])
        check_values(str(path), name, stages[name].tensors, settings[name], artifact)
    return dataclasses.replace(artifact, stages=stages)


def save(artifact: Artifact, folder: str | os.PathLike[str], extras: Mapping[str, bytes] | None = None) -> Artifact:
    """Write an artifact: a new folder appears whole or not at all; an existing one is updated in one step.

    Args:
        extras: files beside the tensors (the card, figures), by plain name; they are not part of the hash.

    Raises:
        ArtifactError: `folder` exists and this artifact was not loaded from it.
        KvcalError: the disk is full or not writable.
    """
    folder = Path(folder)
    extras = extras or {}
    try:
        if has_content(folder):
            if artifact.folder is None or not artifact.folder.exists() or not folder.samefile(artifact.folder):
                raise ArtifactError(f"{folder}: already exists: choose another --output or remove it")
            with _locked(folder):
                if read_manifest(folder)[0].content_hash != artifact.content_hash:
                    raise ArtifactError(f"{folder}: was changed meanwhile by another process: repeat the command")
                content_hash = _write_into(folder, artifact, extras)
        else:
            folder.parent.mkdir(parents=True, exist_ok=True)
            building = _building_place(folder.absolute())
            try:
                building.mkdir()
                content_hash = _write_into(building, artifact, extras)
                building.rename(folder.absolute())
                _sync(folder.absolute().parent)
            finally:
                shutil.rmtree(building, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise KvcalError(f"{folder}: cannot be written ({_reason(error)}); nothing was changed there") from error
    saved = load(folder)
    if saved.content_hash != content_hash:
        raise ArtifactError(f"{folder}: what was read back differs from what was written: check the disk")
    return saved


def has_content(folder: Path) -> bool:
    """Whether something is at `folder` that writing there would destroy."""
    return folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content` in one step that survives a crash."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file, synced to disk; same tensors, same bytes."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    path.chmod(0o644)  # safetensors writes files that only their owner can read; artifacts are shared
    _sync(path)


def _write_into(folder: Path, artifact: Artifact, extras: Mapping[str, bytes]) -> str:
    files = {}
    new = []
    manifest = folder / f".{MANIFEST}.new"
    try:
        for name, stage in artifact.stages.items():
            tensors = stage.tensors
            if isinstance(tensors, StageTensors) and folder.samefile(tensors.folder):
                files[name] = tensors.file
                continue
            temporary = folder / f".{name}.new"
            new.append(temporary)
            save_tensors(temporary, tensors)
            digest = file_sha256(temporary)
            path = folder / f"{name}.{digest[:8]}.safetensors"
            files[name] = StageFile(path.name, digest, temporary.stat().st_size)
            if not path.exists():
                new.append(path)
            temporary.rename(path)
        content_hash = write_manifest(manifest, artifact, files)
        _sync(manifest)
        manifest.rename(folder / MANIFEST)
    except BaseException:
        for path in (*new, manifest):
            path.unlink(missing_ok=True)
        raise
    _sync(folder)
    kept = {file.file for file in files.values()}
    for path in folder.iterdir():
        if FILE_NAME.fullmatch(path.name) and path.name not in kept:
            path.unlink()
    for name, content in extras.items():
        write_atomically(folder / name, content)
    return content_hash


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One writer at a time; the lock goes with the process, however it ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _building_place(folder: Path) -> Path:
    """A hidden sibling to build a new artifact in, after removing those that killed processes left."""
    prefix = f".{folder.name}.building-"
    for left in folder.parent.glob(f"{glob.escape(prefix)}*"):
        if not Path("/proc", left.name.removeprefix(prefix)).exists() and Path("/proc/self").exists():
            shutil.rmtree(left, ignore_errors=True)
    return folder.with_name(f"{prefix}{os.getpid()}")


def _check_bytes(path: Path, file: StageFile) -> None:
    try:
        if not path.is_file():
            raise ArtifactError(f"{path}: cannot be read (no such file, or a device or pipe): fetch it again")
        size = path.stat().st_size
        if size != file.bytes:
            raise ArtifactError(f"{path}: {size} bytes, the manifest says {file.bytes}: truncated? fetch it again")
        found = file_sha256(path)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror}): fetch it again") from error
    if found != file.sha256:
        raise ArtifactError(
            f"{path}: sha256 is {found[:12]}…, the manifest says {file.sha256[:12]}…: damaged, fetch it again"
        )


def _read_header(path: Path) -> Header:
    try:
        with safe_open(path, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (not a mapping)
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(f"{path}: not a readable safetensors file ({error}): fetch it again") from error


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        hint = ": free some space and try again" if error.errno == errno.ENOSPC else ""
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror or error}{hint}"
    return str(error)


__all__ = ["StageTensors", "file_sha256", "has_content", "load", "save", "save_tensors", "write_atomically"]
