"""Rows of JSON files, in memory that does not grow with the file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..artifacts import KvcalError
from .chats import looks_like_chat
from .raw_text import MOST_CHARS, text_chunks

_SPACE, _BETWEEN = re.compile(r"\s*"), re.compile(r"[\s,]*")


def json_values(path: Path, array: bool) -> Iterator[dict[str, Any]]:
    """Objects one after another, as in JSON lines, or (`array`) those in one list."""
    decoder, chunks = json.JSONDecoder(), text_chunks(path)
    text, position, row, within = "", 0, 0, False
    while True:
        position = (_BETWEEN if within else _SPACE).match(text, position).end()  # type: ignore[union-attr]
        if array and row == 0 and not within and text[position : position + 1] == "[":
            within, position = True, position + 1
            continue
        if within and text[position : position + 1] == "]":
            within, position, array = False, position + 1, False
            continue
        problem: Exception | None = None
        if position < len(text):
            try:
                value, end = decoder.raw_decode(text, position)
                if end < len(text) or isinstance(value, dict):  # a number may go on in the next chunk
                    row, position = row + 1, end
                    yield _row(value, f"{path}: row {row}")
                    continue
            except (ValueError, RecursionError) as error:
                problem = error
                if not _cut_off(error, text) or len(text) - position > MOST_CHARS:
                    raise KvcalError(f"{path}: row {row + 1}: is not valid JSON ({_gist(error)}): mend it") from None
        more = next(chunks, None)
        # What is read doubles each time, so that a row of many chunks is parsed again only a few times.
        while more is not None and len(more) < len(text) - position and (following := next(chunks, None)) is not None:
            more += following
        if more is None:
            if problem or within:
                what = _gist(problem) if problem else "the list does not end"
                raise KvcalError(f"{path}: row {row + 1}: is not valid JSON ({what}): cut off? Get it again")
            if position < len(text):
                yield _row(decoder.raw_decode(text, position)[0], f"{path}: row {row + 1}")
            return
        text, position = text[position:] + more, 0


def _cut_off(error: Exception, text: str) -> bool:
    """Whether the text is valid as far as it goes: the error is at its end, or an open quote leads there."""
    position = getattr(error, "pos", None)
    if position is None:
        return False
    return position > len(text) - 16 or "Unterminated" in str(error) or text[position:].isspace()


def _row(value: Any, label: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    if isinstance(value, str):
        return {"text": value}
    if looks_like_chat(value):
        return {"messages": value}
    hint = ", or name the file .json if all of it is one list" if isinstance(value, list) else ""
    raise KvcalError(f"{label}: is a {type(value).__name__}: expected an object, a text or a list of messages{hint}")


def _gist(error: Exception) -> str:
    return getattr(error, "msg", None) or ("too many levels" if isinstance(error, RecursionError) else str(error)[:100])
