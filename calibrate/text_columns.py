"""Which column of a table is its text, and its rows as documents. Nothing is guessed: an error lists the columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..artifacts import KvcalError
from .chats import Chat, read_chat
from .documents import check_characters
from .tables import CHAT, NULL, TEXT, Table

CHATS = ("messages", "conversations", "conversation")
_NEVER = {"author", "category", "date", "file", "filename", "hash", "id", "ids", "index", "key", "label", "lang"}
_NEVER |= {"language", "md5", "name", "path", "sha", "sha1", "sha256", "source", "timestamp", "title", "topic", "type"}
_NEVER |= {"uri", "url", "uuid", "version"}
"""Names of columns that say something about a text, and are not taken for one even where no other is there."""


def documents(table: Table, label: str, asked: str | None) -> Iterator[str | Chat]:
    """The documents of a table's rows; a null is an empty one.

    Args:
        asked: the column, or several joined by "+"; None: the one that can only be the text.

    Raises:
        KvcalError: no such column or no plain choice, or a row that has something else there.
    """
    if not table.kinds:
        return
    columns = _asked(table.kinds, label, asked) if asked is not None else [_only_choice(table.kinds, label)]
    kind = next((table.kinds[name] for name in columns if table.kinds[name] != NULL), NULL)
    tools = ["tools"] if kind == CHAT and "tools" in table.kinds and "tools" not in columns else []
    for number, row in enumerate(table.rows([*columns, *tools]), 1):
        where = f"{label}: row {number}"
        for name in columns:
            if name not in row:
                raise KvcalError(
                    f"{where}: has no column {name!r}, which the rows before have: add it, as null if empty"
                )
        yield _document([row[name] for name in columns], row.get("tools"), columns, where)


def _document(values: Sequence[Any], tools: Any, columns: Sequence[str], where: str) -> str | Chat:
    values = [value for value in values if value is not None and value != []]
    if all(isinstance(value, str) for value in values):
        text = ""
        for value in values:
            text += value if not text or text[-1:].isspace() or value[:1].isspace() else f"\n{value}"
        check_characters(text, where)
        return text
    if all(isinstance(value, list) for value in values):
        return read_chat([message for value in values for message in value], tools, where)
    kinds = " and ".join(sorted({type(value).__name__ for value in values}))
    raise KvcalError(f"{where}: column {'+'.join(columns)!r} holds {kinds}, not text: give other data")


def _asked(kinds: Mapping[str, str], label: str, asked: str) -> list[str]:
    columns = [asked] if asked in kinds else asked.split("+")
    for name in columns:
        if name not in kinds:
            raise KvcalError(f"{label}: no column {name!r} among {_listed(kinds)}: give one of them as --text-column")
        if kinds[name] not in (TEXT, CHAT, NULL):
            raise KvcalError(
                f"{label}: column {name!r} holds {kinds[name]}, neither text nor messages of role and content or from "
                f"and value: give another --text-column of {_listed(kinds)}"
            )
    return columns


def _only_choice(kinds: Mapping[str, str], label: str) -> str:
    choices = [name for name in CHATS if kinds.get(name) == CHAT]
    if kinds.get("text") == TEXT:
        choices.append("text")
    elif kinds.get("content") == TEXT and not kinds.keys() & {"text", "role"}:
        choices.append("content")
    if not choices and len(kinds) == 1:
        ((name, kind),) = kinds.items()
        # A name that is no identifier is the first line of a table without a header.
        if kind in (TEXT, CHAT) and name.isidentifier() and name.lower() not in _NEVER:
            return name
    if len(choices) != 1:
        problem = f"both {' and '.join(choices)} can be the text" if choices else "none is plainly the text"
        advice = "give --text-column NAME"
        if not set(kinds.values()) & {TEXT, CHAT, NULL}:
            advice = "leave it out, or make it rows with a column of text or of messages"
        raise KvcalError(f"{label}: columns {_listed(kinds)}, of which {problem}: {advice}")
    return choices[0]


def _listed(kinds: Mapping[str, str], most: int = 30) -> str:
    names = [f"{name[:60]} ({kind[:40]})" for name, kind in list(kinds.items())[:most]]
    return ", ".join(names) + (f" and {len(kinds) - most} more" if len(kinds) > most else "")
