"""Text as it is handed to a pass: sources, the files or shards of each, and what was read of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from ..artifacts import KvcalError
from .chats import Chat
from .text_files import Unfinished

_NAMED = 100
"""Files that a manifest lists, at most."""

Document: TypeAlias = "str | Chat"
"""A string that is `Unfinished` goes on in the next one."""


@dataclass(frozen=True)
class TextPart:
    """A file, or what else can be read by itself."""

    name: str | None
    """As the manifest lists it; None where the source is one part."""
    documents: Callable[[], Iterator[Document]]
    path: Path | None = None
    wave: int = 0
    """It is read only if all parts of smaller waves have not got enough."""


@dataclass(frozen=True)
class TextSource:
    """What one specification of text stands for."""

    described: dict[str, Any]
    """JSON-able: kind (builtin, hub, local), id, and what else is known of config, split, revision, text_column."""
    parts: tuple[TextPart, ...]
    skipped: Sequence[str] = ()
    """Files that lie there, and are not read since they are of another kind."""

    def state(self, counts: Sequence[tuple[int, int]] | None) -> dict[str, Any]:
        """For a manifest: before reading (None), or after it, by (documents, tokens) of each part."""
        names = [part.name for part in self.parts]
        found = {**self.described, "id": _shown([str(self.described["id"])])[0]}
        unread: list[str] = []
        if counts is not None:
            found |= {"documents": sum(count for count, _ in counts), "tokens": sum(count for _, count in counts)}
            unread = [str(name) for name, (_, tokens) in zip(names, counts, strict=True) if name and not tokens]
        files = [name for name in names if name is not None and name not in set(unread)]
        if files or unread:
            found |= {"files": _shown(files), "num_files": len(files)}
        if counts is not None and len(self.parts) > 1:
            tokens = [count for _, count in counts if count]
            found["file_tokens"] = tokens[:_NAMED]
        for key, listed in (("skipped", self.skipped), ("unread", unread)):
            if listed:
                found |= {key: _shown(listed), f"num_{key}": len(listed)}
        return found


@dataclass(frozen=True)
class TextData:
    """Documents, to be iterated over any number of times: in the order of sources and files.

    `make_blocks` and `make_prompts` mix the parts where there are several.
    """

    sources: tuple[TextSource, ...]
    seed: int = 0
    """Of the order in which parts are mixed."""
    parts: tuple[TextPart, ...] = field(init=False)
    """Of all sources, in their order."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(part for source in self.sources for part in source.parts))

    @property
    def source(self) -> dict[str, Any]:
        """What is known before anything is read, as a manifest states it."""
        return self.state(None)

    def state(self, counts: Sequence[tuple[int, int]] | None) -> dict[str, Any]:
        """`source` with what was read: (documents, tokens) of each part."""
        states, begin = [], 0
        for source in self.sources:
            end = begin + len(source.parts)
            states.append(source.state(None if counts is None else counts[begin:end]))
            begin = end
        mixed = {"order_seed": self.seed} if len(self.parts) > 1 else {}
        if len(states) == 1:
            return {**states[0], **mixed}
        names = [str(state["id"]) for state in states]
        more = f" + {len(names) - 3} more" if len(names) > 3 else ""
        return {"kind": "several", "id": " + ".join(names[:3]) + more, "sources": states, **mixed}

    def __iter__(self) -> Iterator[Document]:
        empty = True
        for part in self.parts:
            for document in not_blank(part.documents()):
                empty = False
                yield document
        if empty:
            raise KvcalError(f"data {self.source['id']}: contains no text: give other data")


def not_blank(documents: Iterator[Document]) -> Iterator[Document]:
    """The documents that are not all white space; of a long one, without pieces of white space at its beginning."""
    begun = False
    for document in documents:
        if begun or not isinstance(document, str) or (document and not document.isspace()):
            yield document
            begun = isinstance(document, Unfinished)


def _shown(names: Sequence[str]) -> list[str]:
    """The first names, as a manifest can hold them: bytes in them that are no characters become escapes."""
    return [name.encode(errors="backslashreplace").decode() for name in names[:_NAMED]]
