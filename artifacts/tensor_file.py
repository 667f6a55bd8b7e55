"""A safetensors file whose tensors are read when asked for, and are those that were verified.

The file is not mapped into memory: one that is written to after the check would change tensors in silence, and one
that is cut off would end the process. Of a small file the content is kept, of a large one the descriptor and a hash of
every tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import ArtifactError
from .plain_files import open_plain

SMALL = 64 * 1024 * 1024
"""Bytes up to which the content of a file is kept in memory."""
_CHUNK = 4 * 1024 * 1024
_MAX_HEADER = 100_000_000
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Those of safetensors' dtypes that we write."""


@dataclass(frozen=True)
class StageFile:
    """Where tensors lie, and what they must hash to."""

    file: str
    """A plain name."""
    sha256: str
    bytes: int


@dataclass(frozen=True)
class _Entry:
    dtype: str
    shape: tuple[int, ...]
    begin: int
    """Offset of its first byte in the file."""
    end: int


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a verified file, by name; every access reads, and copies, anew.

    Raises:
        ArtifactError: the file is not there, no plain one, no safetensors file, or not the one that `file` describes;
            on access: it was changed or cut off after it was verified.
    """

    def __init__(self, folder: Path, file: StageFile):
        self.file = file
        self.path = folder / file.file
        try:
            self._descriptor = open_plain(self.path)
            weakref.finalize(self, os.close, self._descriptor)
            size = os.fstat(self._descriptor).st_size
            if size != file.bytes:
                raise ArtifactError(
                    f"{self.path}: {size} bytes, the manifest says {file.bytes}: truncated? fetch it again"
                )
            if size <= SMALL:
                self._content: bytes | None = b"".join(_chunks(self._descriptor, 0, size))
                self._entries = _parse_header(self._content, size)
                found = hashlib.sha256(self._content).hexdigest()
            else:
                head = os.pread(self._descriptor, 8 + _header_bytes(os.pread(self._descriptor, 8, 0), size), 0)
                self._content, self._entries = None, _parse_header(head, size)
                found, self._digests = _hashes(self._descriptor, head, self._entries)
        except OSError as error:
            raise ArtifactError(f"{self.path}: cannot be read ({error.strerror}): fetch it again") from error
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ArtifactError(f"{self.path}: not a readable safetensors file ({error}): fetch it again") from error
        if found != file.sha256:
            raise ArtifactError(
                f"{self.path}: sha256 is {found[:12]}…, the manifest says {file.sha256[:12]}…: damaged, fetch it again"
            )

    @property
    def header(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """name -> (safetensors dtype, shape)."""
        return {name: (entry.dtype, entry.shape) for name, entry in self._entries.items()}

    def moved_to(self, folder: Path) -> None:
        """Errors name the file in `folder` from now on: its folder was renamed."""
        self.path = folder / self.file.file

    def lies_in(self, folder: Path) -> bool:
        """Whether the file of this name in `folder` is this very file."""
        try:
            return os.path.samestat((folder / self.file.file).lstat(), os.fstat(self._descriptor))
        except OSError:
            return False

    def chunks(self) -> Iterator[bytes]:
        """The bytes of the file. Raises ArtifactError at the end where they are no longer those that were verified."""
        whole = hashlib.sha256()
        kept = self._content
        for chunk in [kept] if kept is not None else _chunks(self._descriptor, 0, self.file.bytes):
            whole.update(chunk)
            yield chunk
        if whole.hexdigest() != self.file.sha256:
            raise ArtifactError(f"{self.path}: was changed after it was verified: fetch it again, or load it again")

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[name]
        if entry.begin == entry.end:
            return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        return torch.frombuffer(self._bytes(name, entry), dtype=DTYPES[entry.dtype]).view(entry.shape)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles hold the tensors, not the file."""
        return dict, (dict(self),)

    def _bytes(self, name: str, entry: _Entry) -> bytearray:
        if self._content is not None:
            return bytearray(memoryview(self._content)[entry.begin : entry.end])
        found = bytearray()
        for chunk in _chunks(self._descriptor, entry.begin, entry.end):
            found += chunk
        if hashlib.sha256(found).digest() != self._digests[name]:
            raise ArtifactError(
                f"{self.path}: tensor {name} was changed after the file was verified: fetch it again, or load it again"
            )
        return found


def _header_bytes(begin: bytes, size: int) -> int:
    """Length of the header, which the first eight bytes of a file state."""
    length = int.from_bytes(begin[:8], "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER):
        raise ValueError("its header is longer than the file")
    return length


def _parse_header(head: bytes, size: int) -> dict[str, _Entry]:
    """Names, shapes and places as safetensors lays them out: one after the other, without gaps, to the file's end.

    Args:
        head: the file's beginning, its header and maybe more.
        size: of the file.

    Raises:
        ValueError, and what a header of another form leads to.
    """
    length = _header_bytes(head, size)
    stated = json.loads(head[8 : 8 + length], object_pairs_hook=_distinct)
    stated.pop("__metadata__", None)
    start = end = 8 + length
    found = {}
    for name, entry in sorted(stated.items(), key=lambda item: tuple(item[1]["data_offsets"])):
        shape, (begin, stop) = tuple(entry["shape"]), entry["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (*shape, begin, stop)):
            raise ValueError(f"tensor {name!r}: shape and offsets are no counts")
        if start + begin != end or stop - begin != math.prod(shape) * DTYPES[entry["dtype"]].itemsize:
            raise ValueError(f"tensor {name!r} does not lie where the one before ends, or has another size")
        end = start + stop
        found[name] = _Entry(entry["dtype"], shape, start + begin, end)
    if end != size:
        raise ValueError(f"tensors end at byte {end} of {size}")
    return found


def _hashes(file: int, head: bytes, entries: Mapping[str, _Entry]) -> tuple[str, dict[str, bytes]]:
    """(sha256 of the whole file, that of every tensor), over the very header that was parsed."""
    whole, digests = hashlib.sha256(head), {}
    for name, entry in entries.items():
        part = hashlib.sha256()
        for chunk in _chunks(file, entry.begin, entry.end):
            whole.update(chunk)
            part.update(chunk)
        digests[name] = part.digest()
    return whole.hexdigest(), digests


def _chunks(file: int, begin: int, end: int) -> Iterator[bytes]:
    while begin < end and (chunk := os.pread(file, min(_CHUNK, end - begin), begin)):
        yield chunk
        begin += len(chunk)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands there twice")
    return found
