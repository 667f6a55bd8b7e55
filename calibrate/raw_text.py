"""Files as a stream of text: decompressed, decoded, with line ends as "\\n", in memory that does not grow with them."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..artifacts import KvcalError
from ..runtime import hub

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
MOST_CHARS = 1 << 26
"""Characters of a row of a table, at most: a longer one is a file of another kind, and would be read whole."""
_CHUNK = 1 << 18


def text_chunks(path: Path, encoding: str = "utf-8-sig") -> Iterator[str]:
    """The text of a file in pieces of any size, none of them empty.

    Raises:
        KvcalError: cannot be read, damaged, not of this encoding, or with a zero byte, which no text has.
    """
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(encoding)(), translate=True)
    read = 0
    for data in _bytes(path):
        read += len(data)
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            position = read - len(error.object) + error.start
            stated = "UTF-8" if encoding == "utf-8-sig" else encoding
            raise KvcalError(
                f"{path}: not {stated} text ({error.reason} at byte {position}): convert it, or leave it out"
            ) from None
        if "\0" in text:
            raise KvcalError(f"{path}: binary data, not text: leave it out")
        if text:
            yield text


def first_bytes(path: Path) -> bytes:
    """The beginning of a file, decompressed. Raises KvcalError as `text_chunks` does."""
    return next(_bytes(path))


def _bytes(path: Path) -> Iterator[bytes]:
    """The bytes of a file in chunks, the last of them b""."""
    try:
        with _opened(path) as file:
            while data := file.read(_CHUNK):
                yield data
            yield b""
    except Exception as error:  # every decompressor raises errors of its own, and nothing of ours runs inside
        reason = getattr(error, "strerror", None) or hub.one_line(error)
        raise KvcalError(f"{path}: cannot be read ({reason}): check it, or leave it out") from None


def _opened(path: Path) -> Any:
    ending = path.suffix.lower()
    if ending == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return openers.get(ending, open)(path, "rb")
