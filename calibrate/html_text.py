"""The text of HTML pages: what a reader reads, without scripts, navigation and menus, in paragraphs."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser

from ..artifacts import KvcalError
from .raw_text import MOST_CHARS


def _words(names: str) -> frozenset[str]:
    return frozenset(names.split())


_SILENT = _words(
    "script style template noscript title nav menu select button textarea iframe object svg canvas audio video"
)
"""Elements of which nothing is read."""
_FURNITURE = _words(
    "nav navbar navigation navheader navfooter docnav menu menubar toc breadcrumb breadcrumbs banner search "
    "sphinxsidebar headerlink"
)
"""Classes, ids and roles of navigation and menus. Not "sidebar" nor "note": manuals put text into those."""
_CONTAINERS = _words("div ul ol dl table section aside header footer form a span")
"""Elements that may be left out by class, id or role: their end tag is obligatory, so the rest of the page is kept."""
_PARAGRAPHS = _words(
    "address article aside blockquote body center details div dl fieldset figure figcaption footer form h1 h2 h3 h4 h5 "
    "h6 header hr main menu nav ol p pre section summary table ul"
)
_LINES = _words("br caption dd dt li tr")
_GAPS = ("", " ", "\n", "\n\n")
_CHARSET = re.compile(rb"""(?:charset|encoding)\s*=\s*["']?\s*([\w.:-]+)""", re.IGNORECASE)
_KNOWN_CHARSETS = re.compile(r"us-ascii|(windows|iso-8859)-\d+|koi8-[ru]|shift_jis|euc-(jp|kr)|gb(k|2312|18030)|big5")


def page_text(name: str, chunks: Iterable[str]) -> Iterator[str]:
    """The text of the page that `chunks` are, in pieces, none of them empty.

    Raises:
        KvcalError: a tag, comment or script that does not end.
    """
    page = _Page()
    for chunk in chunks:
        page.feed(chunk)
        if len(page.rawdata) > MOST_CHARS:  # what was fed and has not ended yet
            raise KvcalError(f"{name}: a tag or comment of more than {MOST_CHARS} characters: no HTML, leave it out")
        yield from page.taken()
    page.close()
    yield from page.taken()


def charset(name: str, beginning: bytes) -> str:
    """The encoding that a page names in its first bytes, for `codecs`; UTF-8 where it names none.

    Raises:
        KvcalError: one that is not known.
    """
    found = None if beginning.startswith(b"\xef\xbb\xbf") else _CHARSET.search(beginning[:1024])
    label = found[1].decode("ascii", "replace").lower() if found else "utf-8"
    if label in ("utf-8", "utf8"):
        return "utf-8-sig"
    if not (_KNOWN_CHARSETS.fullmatch(label) and _has_codec(label)):
        raise KvcalError(f"{name}: its charset {label[:40]!r} is not known: convert it to UTF-8, or leave it out")
    # As browsers read it: pages that say Latin-1 were written on Windows.
    return "windows-1252" if label in ("iso-8859-1", "us-ascii") else label


def _has_codec(label: str) -> bool:
    try:
        codecs.lookup(label)
    except LookupError:
        return False
    return True


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._pieces: list[str] = []
        self._gap = 0
        self._empty = True
        self._verbatim = 0
        self._line_ends = ""
        self._left_out: str | None = None
        self._depth = 0

    def taken(self) -> Iterator[str]:
        text = "".join(self._pieces)
        self._pieces = []
        if text:
            yield text

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._left_out is not None:
            self._depth += tag == self._left_out
            return
        if tag in _SILENT or (tag in _CONTAINERS and _is_furniture(attrs)):
            self._left_out, self._depth = tag, 1
        self._verbatim += tag == "pre"
        self._part(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._left_out is None:
            self._part(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._left_out is not None:
            self._depth -= tag == self._left_out
            if self._depth == 0:
                self._left_out = None
        elif tag == "pre":
            self._verbatim = max(0, self._verbatim - 1)
        self._part(tag)

    def handle_data(self, data: str) -> None:
        if self._left_out is not None:
            return
        data = data.replace("\u00ad", "")
        if self._verbatim:
            inside = data.lstrip("\n") if self._gap == 3 else data  # the line end behind <pre> is not shown
            text = inside.rstrip("\n")
            self._write(text)
            self._line_ends += inside[len(text) :]
            return
        if data[:1].isspace():
            self._gap = max(self._gap, 1)
        self._write(" ".join(data.split()))
        if data[-1:].isspace():
            self._gap = max(self._gap, 1)

    def parse_marked_section(self, i: int, report: bool = True) -> int:
        """The standard library fails an assertion at sections that it does not know, which pages have."""
        try:
            return super().parse_marked_section(i, report)
        except AssertionError:
            return self.parse_bogus_comment(i)

    def _part(self, tag: str) -> None:
        gap = 3 if tag in _PARAGRAPHS else 2 if tag in _LINES else 1 if tag in ("td", "th") else 0
        self._gap = max(self._gap, gap)

    def _write(self, text: str) -> None:
        if text:
            gap = self._line_ends if self._gap < 3 else ""
            self._pieces += [text] if self._empty else [gap, _GAPS[self._gap], text]
            self._gap, self._line_ends, self._empty = 0, "", False


def _is_furniture(attrs: list[tuple[str, str | None]]) -> bool:
    given = {name: (value or "").lower() for name, value in attrs}
    words = {word for name in ("class", "id", "role") for word in given.get(name, "").split()}
    return "hidden" in given or given.get("aria-hidden") == "true" or bool(words & _FURNITURE)
