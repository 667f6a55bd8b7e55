"""How our objects are shown: in one short line where Python prints them, as a small table in a notebook."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from .errors import one_line

_LONGEST = 80


class Shown:
    """Gives `__repr__` and `_repr_html_` to a class that says its `facts`."""

    def facts(self) -> Mapping[str, str]:
        """What there is to know in a few words, by name."""
        raise NotImplementedError

    def __repr__(self) -> str:
        facts = ", ".join(f"{name} {short(text)}" for name, text in self.facts().items())
        return f"{type(self).__name__}({facts})"

    def _repr_html_(self) -> str:
        return html_table([type(self).__name__, ""], [[name, text] for name, text in self.facts().items()])


def short(text: object, longest: int = _LONGEST) -> str:
    """A line of at most so many characters, without what a terminal would act on."""
    line = one_line(text)
    return line if len(line) <= longest else line[: longest - 1] + "…"


def html_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table of text; what strangers wrote stands in it as text."""

    def row(kind: str, cells: Sequence[object]) -> str:
        return "<tr>" + "".join(f"<{kind}>{html.escape(one_line(cell))}</{kind}>" for cell in cells) + "</tr>"

    body = "".join(row("td", cells) for cells in rows)
    return f"<table><thead>{row('th', header)}</thead><tbody>{body}</tbody></table>"
