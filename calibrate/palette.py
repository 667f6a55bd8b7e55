"""The colours of all figures: one for each method, whatever else is drawn beside it.

Every colour has a contrast of at least 3 against white and against the report's dark ground, so that the same serve
both. Within these bounds they were chosen to be as far apart as 14 can be, for normal sight and with red- or
green-blindness. Since 14 colours cannot all be told apart then, every method has its own marker, too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Style:
    """How a method is drawn."""

    color: str
    """"#rrggbb"."""
    marker: str
    """As matplotlib names it."""


METHOD_STYLES = {
    "full": Style("#767676", "o"),
    "spectral": Style("#378bfd", "s"),
    "loki": Style("#e37407", "D"),
    "exact_topk": Style("#ae5447", "^"),
    "clusterkv": Style("#37a657", "v"),
    "quest": Style("#7459c7", "P"),
    "sparq": Style("#4f9baa", "X"),
    "streaming": Style("#e50e0c", "p"),
    "h2o": Style("#c820a3", "*"),
    "snapkv": Style("#f25ca0", "<"),
    "subgen": Style("#07780b", ">"),
    "xcla": Style("#076e94", "h"),
    "cla": Style("#940ef4", "d"),
    "plan": Style("#ab6fd2", "8"),
}
FALLBACK = Style("#8d7b5a", "H")
"""Of any other method, e.g. one of another library."""
QUANTITY_COLORS = {
    "key_pre": "#4f9baa",
    "key_post": "#378bfd",
    "query_pre": "#f25ca0",
    "query_post": "#e50e0c",
    "value": "#37a657",
}
COMPARED_COLORS = ("#378bfd", "#e37407", "#37a657")
"""Of two or three things compared that are no methods: starting points, losses, keys and values."""
LAYER_COLORS = ("#3564d0", "#8f55cf", "#c9489f", "#e2574c", "#de780c")
"""Of the sequential colour map of layers, from the first to the last. It gets lighter all the way, and no end of it is
lost on a white or a dark ground, as those of the common maps are."""


def style_of(name: str) -> Style:
    """The style of a method by its name or by that of its line: "loki score" is drawn as `loki`, "SnapKV (kvpress)" as
    `snapkv`, "cla+loki" as `cla`; what is not known as `FALLBACK`."""
    first = re.match(r"\w+", name)
    return METHOD_STYLES.get(first[0].lower(), FALLBACK) if first else FALLBACK
