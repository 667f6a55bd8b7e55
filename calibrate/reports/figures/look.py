"""What the report's figures have in common: colours that follow the page, sizes, and how names are passed.

Colours of texts and lines are the page's CSS variables, so that a figure follows dark mode at once. Names of strangers
are values of data only: never a field, a title, an expression or a part of the specification.
"""

from __future__ import annotations

from functools import cache
from typing import Any

HEIGHT = 260
_INK, _LINE = "var(--ink)", "var(--line)"
_TEXT = {"labelColor": _INK, "titleColor": _INK, "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal"}
CONFIG: dict[str, Any] = {
    "background": "transparent",
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {**_TEXT, "domainColor": _INK, "tickColor": _INK, "gridColor": _LINE, "labelOverlap": True},
    "legend": {**_TEXT, "orient": "bottom", "gradientLength": 200},
    "rule": {"color": _INK},
    "aria": True,
}


def specification(chart: Any, described: str) -> dict[str, Any]:
    """A chart as the page embeds it: as wide as its place.

    Args:
        described: what it shows, for those who do not see it.
    """
    sized = chart.properties(width="container", height=HEIGHT, description=described).configure(**CONFIG)
    found: dict[str, Any] = sized.to_dict()
    return found


@cache
def symbol(marker: str) -> str:
    """A marker of the palette as an SVG path within -1 … 1, which Vega draws."""
    from matplotlib.markers import MarkerStyle

    style = MarkerStyle(marker)
    polygons: list[Any] = style.get_path().transformed(style.get_transform()).to_polygons(closed_only=False)
    largest = max(abs(float(number)) for polygon in polygons for point in polygon for number in point)
    pieces = []
    for polygon in polygons:
        points = [f"{x / largest:.3f},{-y / largest:.3f}" for x, y in polygon]
        pieces.append(f"M{'L'.join(points)}Z")
    return "".join(pieces)
