"""What strangers wrote, in the Markdown and YAML of a card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..artifacts.errors import one_line

_MOST = 300


def code(value: object, most: int = _MOST) -> str:
    """A value as a code span, in which nothing is markup: no HTML, no link, no picture, no end of a table's cell.

    Backticks and pipes become escapes, since a table is cut at its pipes before anything else is read.
    """
    text = one_line(value)
    text = text if len(text) <= most else text[: most - 1] + "…"
    text = text.replace("`", r"\x60").replace("|", r"\x7c")
    return f"`{text}`" if text.strip() else "–"


def front_matter(entries: Mapping[str, Any]) -> str:
    """The YAML between the lines of dashes at the top of a card."""
    import yaml

    return f"---\n{yaml.safe_dump(dict(entries), sort_keys=False)}---"
