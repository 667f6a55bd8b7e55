"""Pages of results: a Jinja2 template beside its room, and figures that say what data they were drawn from."""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_NAME = b"Data-sha256"
"""Of the text chunk of a PNG that says which data it was drawn from."""
_END = 12
"""Bytes of the chunk that ends a PNG."""


@dataclass(frozen=True)
class Figure:
    name: str
    sources: Sequence[Path]
    """The JSON files that it is drawn from."""
    draw: Callable[[], bytes]
    """A PNG."""

    def digest(self) -> str:
        found = hashlib.sha256()
        for path in sorted(self.sources):
            found.update(f"{path.name}\0".encode() + path.read_bytes())
        return found.hexdigest()


@dataclass(frozen=True)
class Page:
    name: str
    """Its file, from docs/results."""
    template: Path
    values: Callable[[Path], Mapping[str, Any]]
    """From the folder of results: what the template takes by name."""
    figures: Callable[[Path], Sequence[Figure]] = lambda results: ()

    def text(self, results: Path) -> str:
        """
        Raises:
            NotMeasured: the template asks for what is not in the results.
        """
        import jinja2

        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(self.template.parent),
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            autoescape=False,  # Markdown
        )
        return environment.get_template(self.template.name).render(self.values(results)).strip() + "\n"

    def write(self, results: Path, pages: Path) -> None:
        path = pages / self.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.text(results))
        for figure in self.figures(results):
            target = path.with_name(figure.name)
            if digest_in(target) != figure.digest():
                target.write_bytes(stamped(figure.draw(), figure.digest()))

    def older(self, results: Path, pages: Path) -> list[str]:
        """The files that are not what would be written now."""
        path = pages / self.name
        same = path.exists() and path.read_text() == self.text(results)
        drawn = [(path.with_name(figure.name), figure.digest()) for figure in self.figures(results)]
        return [*([] if same else [self.name]), *(target.name for target, now in drawn if digest_in(target) != now)]


def stamped(png: bytes, digest: str) -> bytes:
    """With the digest in a text chunk before the end."""
    body = b"tEXt" + _NAME + b"\0" + digest.encode()
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return png[:-_END] + chunk + png[-_END:]


def digest_in(path: Path) -> str | None:
    """None: there is no such file, or it does not say."""
    if not path.exists():
        return None
    _, found, rest = path.read_bytes().rpartition(b"tEXt" + _NAME + b"\0")
    return rest[:64].decode() if found else None
