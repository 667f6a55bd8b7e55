"""The header of a GGUF file, read with bounds: the package `gguf` and transformers believe what it says.

Metadata (keys with values), then the list of tensors, then their data. transformers reads the metadata into a Python
object per element, so a few MB of a hostile file would take all memory.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...artifacts import KvcalError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""GGUF's number of a type -> struct's letter."""
_STRING, _ARRAY = 8, 9
_MOST_KEYS, _MOST_TENSORS, _MOST_ELEMENTS = 1 << 12, 1 << 16, 1 << 22
"""The largest models known have 33 keys, some 1000 tensors and 1.3 million elements of arrays."""
_MOST_NAME, _MOST_NUMBERS = 1 << 10, 1 << 44
_SHORT = 1 << 12
"""Arrays of numbers up to this length are kept; of longer ones, and of arrays of strings, only the length."""


@dataclass(frozen=True)
class GgufTensor:
    name: str
    shape: tuple[int, ...]
    """The fastest dimension first."""
    type: int
    """ggml's number of its type."""
    offset: int
    """Bytes from the start of the file."""

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class GgufHeader:
    metadata: Mapping[str, Any]
    """Numbers, flags, strings, short lists of numbers."""
    lengths: Mapping[str, int]
    """Length of every array, by key."""
    tensors: tuple[GgufTensor, ...]
    size: int
    """Bytes of the file."""

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))


def read_header(path: Path, name: str) -> GgufHeader:
    """Raises KvcalError: cut off, damaged, or with counts of no model.

    Args:
        name: for people.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Reader(content, len(content)).header()
    except _Bad as bad:
        raise KvcalError(f"{name}: is not a whole GGUF file ({bad}): fetch it again") from None
    except (OSError, ValueError) as error:
        raise KvcalError(f"{name}: cannot be read ({error}): fetch it again") from None


class _Bad(Exception):
    """What is wrong in the header."""


class _Reader:
    def __init__(self, content: mmap.mmap, size: int):
        self.content, self.size, self.at, self.elements = content, size, 4, 0

    def header(self) -> GgufHeader:
        version = self.number("I")
        if version & 0xFFFF == 0:
            raise _Bad("its numbers are big-endian, little-endian ones are expected")
        if version not in (2, 3):
            raise _Bad(f"version {version}, 2 or 3 is expected")
        tensors, keys = self.count("tensors", _MOST_TENSORS), self.count("keys", _MOST_KEYS)
        metadata: dict[str, Any] = {}
        lengths: dict[str, int] = {}
        for _ in range(keys):
            key = self.text(_MOST_NAME)
            if key in metadata or key in lengths:
                raise _Bad(f"{key!r} is there twice")
            value = self.value(self.number("I"), key, lengths)
            if value is not None:
                metadata[key] = value
        found = [self.tensor() for _ in range(tensors)]
        if len({tensor.name for tensor in found}) < tensors:
            raise _Bad("a tensor is there twice")
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= 1 << 16 or alignment & (alignment - 1):
            raise _Bad(f"general.alignment {str(alignment)[:40]}, a power of two is expected")
        start = -(-self.at // alignment) * alignment
        placed = [GgufTensor(tensor.name, tensor.shape, tensor.type, start + tensor.offset) for tensor in found]
        return GgufHeader(metadata, lengths, tuple(placed), self.size)

    def number(self, letter: str) -> Any:
        try:
            (value,) = struct.unpack_from(f"<{letter}", self.content, self.at)
        except struct.error:
            raise _Bad("it ends in its header") from None
        self.at += struct.calcsize(f"<{letter}")
        return value

    def count(self, what: str, most: int) -> int:
        value: int = self.number("Q")
        if value > most:
            raise _Bad(f"{value} {what}, at most {most} are expected")
        return value

    def text(self, most: int | None = None) -> str:
        length = self.number("Q")
        if length > self.size - self.at:
            raise _Bad("it ends in its header")
        if most is not None and length > most:
            raise _Bad(f"a name of {length} bytes, at most {most} are expected")
        text = self.content[self.at : self.at + length]
        self.at += length
        try:
            return text.decode()
        except UnicodeDecodeError:
            raise _Bad("a string that is not UTF-8") from None

    def value(self, kind: int, key: str, lengths: dict[str, int]) -> Any:
        """The value of a key; None: an array of which only the length is kept."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise _Bad(f"{key!r} is of type {kind}, which there is not")
        inner, length = self.number("I"), self.number("Q")
        if inner not in _SCALARS and inner != _STRING:
            raise _Bad(f"{key!r} is an array of type {inner}, numbers or strings are expected")
        self.elements += length
        if self.elements > _MOST_ELEMENTS:
            raise _Bad(f"{key!r} is an array of {length}, at most {_MOST_ELEMENTS} in all are expected")
        lengths[key] = length
        if inner == _STRING:
            for _ in range(length):
                self.text()
            return None
        width = struct.calcsize(f"<{_SCALARS[inner]}")
        if length * width > self.size - self.at:
            raise _Bad("it ends in its header")
        values = struct.unpack_from(f"<{length}{_SCALARS[inner]}", self.content, self.at) if length <= _SHORT else None
        self.at += length * width
        return None if values is None else list(values)

    def tensor(self) -> GgufTensor:
        name, dimensions = self.text(_MOST_NAME), self.number("I")
        if not 1 <= dimensions <= 4:
            raise _Bad(f"tensor {name!r} of {dimensions} dimensions, 1 to 4 are expected")
        shape = tuple(self.number("Q") for _ in range(dimensions))
        if not 0 < math.prod(shape) <= _MOST_NUMBERS:
            raise _Bad(f"tensor {name!r} of shape {shape}")
        return GgufTensor(name, shape, self.number("I"), self.number("Q"))
