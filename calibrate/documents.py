"""Checks of the documents that callers give: much that is no list of texts can be iterated over, and yields strings."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..artifacts import KvcalError


def each_document(documents: Iterable[Any], kinds: tuple[type, ...] = (str,)) -> Iterator[Any]:
    """The documents, one after the other.

    Raises:
        KvcalError: not an iterable of documents, or one of them is of none of these kinds.
    """
    if advice := _advice(documents):
        raise KvcalError(f"documents: {_described(documents)}: {advice}")
    for number, document in enumerate(documents):
        if not isinstance(document, kinds):
            raise KvcalError(f"document {number}: {_described(document)}: give text, a str for each document")
        yield document


def check_characters(text: str, label: str = "text") -> None:
    """Raises KvcalError for half a character (a lone surrogate), which no tokenizer takes.

    Args:
        label: where.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = ascii(text[max(0, error.start - 20) : error.start + 20])
        raise KvcalError(
            f"{label} with half a character (U+{ord(text[error.start]):04X} in {around}): read it as UTF-8 with "
            "errors='replace', or leave it out"
        ) from None


def _advice(documents: Any) -> str | None:
    """What to give in place of something that is no documents; None where it may be some."""
    if isinstance(documents, str):
        return "its characters would be the documents: give [text], or open_data(name) for a file or data set"
    if isinstance(documents, (bytes, bytearray, memoryview)):
        return "give [data.decode()]"
    if isinstance(documents, os.PathLike):
        return "give open_data(path)"
    if isinstance(documents, io.IOBase):
        return "its lines would be the documents: give [file.read()], or open_data(path)"
    if isinstance(documents, Mapping) or hasattr(documents, "columns"):
        return "its keys would be the documents: give the column of texts"
    try:
        iter(documents)
    except TypeError:
        return "give a list of texts, or open_data(name)"
    return None


def _described(value: Any) -> str:
    shown = ascii(value) if isinstance(value, (str, bytes, int, float)) else ""
    return f"a {type(value).__name__}" + (f" ({shown[:40]}{'…' if len(shown) > 40 else ''})" if shown else "")
