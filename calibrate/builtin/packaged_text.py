"""English prose that Debian packages install, split by chapter into train and held-out parts.

Nothing of it is in kvcal: the pages are read where the package put them, under `/`, or under the folder that the
environment variable KVCAL_TEXT_ROOT names, in which it was unpacked. A document is a chapter, and every fifth one is
held out: the two parts share no page, and differ no more than chapters of one book do.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ...artifacts import KvcalError

ROOT = "KVCAL_TEXT_ROOT"
HELD_OUT_EVERY, HELD_OUT_FIRST = 5, 2
"""Of the chapters in the order of the book, counted from zero."""

Chapters = dict[str, list[str]]
"""Name -> its pages, both in the order of the book."""


@dataclass(frozen=True)
class PackagedText:
    """Where a package has its pages, and which of them are a chapter."""

    package: str
    about: str
    pages: str
    """Folder of the pages, in the package's documentation."""
    chapters_of: Callable[[Path], Chapters]

    @property
    def folder(self) -> Path:
        return _documentation() / self.package / self.pages

    def chapters(self) -> Chapters:
        """Raises KvcalError: the package is not there."""
        found = self.chapters_of(self.folder) if self.folder.is_dir() else {}
        if not found:
            raise KvcalError(f"data {self.package}: no pages in {self.folder}: {self.how_to_get_it()}")
        return found

    def is_here(self) -> bool:
        return self.folder.is_dir() and bool(self.chapters_of(self.folder))

    def how_to_get_it(self) -> str:
        """Containers often leave out all documentation when they install: unpacking works there, and without root."""
        return (
            f"apt install {self.package}, or unpack Debian's package (apt-get download {self.package} && dpkg-deb -x "
            f"{self.package}_*.deb FOLDER) and set {ROOT}=FOLDER"
        )

    def version(self) -> str | None:
        """Of the package, by its own changelog."""
        for name in ("changelog.Debian.gz", "changelog.gz"):
            try:
                with gzip.open(
                    _documentation() / self.package / name, "rt", encoding="utf-8", errors="replace"
                ) as file:
                    if stated := re.match(rf"{self.package} \(([\w.+:~-]+)\)", file.readline()):
                        return stated[1]
            except (OSError, EOFError):
                continue
        return None

    def documents(self, split: str) -> Iterator[str]:
        """The chapters of "train" or "heldout", in an order that depends on their names only."""
        from ..text_files import read

        chapters = self.chapters()
        held_out = {name for at, name in enumerate(chapters) if at % HELD_OUT_EVERY == HELD_OUT_FIRST}
        # By hash, so that any prefix of the stream is a fair sample.
        for name in sorted(chapters, key=lambda name: hashlib.sha256(name.encode()).digest()):
            if (name in held_out) == (split == "heldout"):
                pages = ("".join(read(self.folder / page)) for page in chapters[name])  # type: ignore[arg-type]
                yield "\n\n".join(page for page in pages if page)


def _documentation() -> Path:
    return Path(os.environ.get(ROOT) or "/").expanduser() / "usr/share/doc"


def by_contents(folder: Path) -> Chapters:
    """Pages as index.html lists them; those named sect.… go on with the chapter before them."""
    try:
        contents = (folder / "index.html").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    found: Chapters = {}
    name = ""
    for page in dict.fromkeys(re.findall(r'href="([\w.-]+\.html)', contents)):
        if page == "index.html" or not (folder / page).is_file():
            continue
        name = name if name and page.startswith("sect.") else page.removesuffix(".html")
        found.setdefault(name, []).append(page)
    return found


def by_letter(folder: Path) -> Chapters:
    """Pages named secA1.html, of section A, which secAint.html begins and secAcon.html ends."""
    pages = (re.fullmatch(r"sec([A-Z])(int|\d+|con)\.html", path.name) for path in folder.iterdir())
    ends = {"int": "0", "con": "1000000"}
    found: Chapters = {}
    for page in sorted(filter(None, pages), key=lambda page: (page[1], int(ends.get(page[2], page[2])))):
        found.setdefault(f"section {page[1]}", []).append(page[0])
    return found


TEXTS = {
    text.package: text
    for text in (
        PackagedText(
            "debian-handbook",
            "The Debian Administrator's Handbook (GPL-2+ or CC-BY-SA-3.0), 280 000 tokens",
            "html/en-US",
            by_contents,
        ),
        PackagedText(
            "anarchism",
            "An Anarchist FAQ (GPL-2), 1.6 million tokens",
            "html",
            by_letter,
        ),
    )
}
"""By alias, which is the package's name."""
