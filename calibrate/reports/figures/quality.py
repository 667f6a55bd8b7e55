"""Quality against bytes: every setting a point in its method's colour and marker, with its standard error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...evaluation.axes import ratio_limits
from ...evaluation.figure import ALIKE, LINE_FROM
from ...palette import FALLBACK, METHOD_STYLES, style_of
from ..measured import Point
from .look import specification, symbol

TITLES = {
    "read": "bytes read per step, of full's",
    "held": "bytes of memory, of full's",
    "ratio": "perplexity / full's",
    "score": "mean score of the tasks",
}
COSTS, QUALITIES = ("read", "held"), ("ratio", "score")
_POWERS = [2.0**power for power in range(-10, 3)]


@dataclass(frozen=True)
class Shown:
    """A method in the legend."""

    name: str
    color: str
    path: str
    """Of its marker, as SVG within -1 … 1."""


def legend(points: Sequence[Point]) -> list[Shown]:
    """The methods of the points, in the order of the palette."""
    found = {_styled(point.method): None for point in points}
    return [
        Shown(name, style.color, symbol(style.marker))
        for name, style in {**METHOD_STYLES, "other": FALLBACK}.items()
        if name in found
    ]


def quality_figure(points: Sequence[Point], cost: str, quality: str) -> dict[str, Any] | None:
    """
    Args:
        cost: "read" or "held".
        quality: "ratio" or "score".

    Returns:
        None: no point has both.
    """
    import altair as alt

    data = [_datum(point, cost, quality) for point in points]
    data = [datum for datum in data if datum["x"] is not None and datum["value"] is not None]
    if not data:
        return None
    low, high = (0.0, 1.0) if quality == "score" else ratio_limits([datum["value"] for datum in data])
    lines: dict[str, list[float]] = {}
    for datum in data:
        lines.setdefault(datum["series"], []).append(datum["x"])
    for datum in data:
        datum["beyond"] = datum["value"] > high
        datum["y"] = min(datum["value"], high)
        error = 0.0 if datum["beyond"] else datum["error"]
        datum["low"], datum["high"] = (min(max(datum["y"] + sign * error, low), high) for sign in (-1, 1))
        shares = lines[datum["series"]]
        datum["joined"] = len(shares) >= LINE_FROM and max(shares) > ALIKE * min(shares)
    styles = {**METHOD_STYLES, "other": FALLBACK}
    names, colors = list(styles), [style.color for style in styles.values()]
    color = alt.Color("drawn:N", scale=alt.Scale(domain=names, range=colors), legend=None)
    shape = alt.Shape(
        "drawn:N", scale=alt.Scale(domain=names, range=[symbol(style.marker) for style in styles.values()]), legend=None
    )
    # From a half to the whole at least, so that the axis has two ticks.
    least, most = min(0.5, *(datum["x"] for datum in data)), max(1.0, *(datum["x"] for datum in data))
    label = "datum.value >= 1 ? format(datum.value, '') : '1/' + format(1 / datum.value, '')"
    base = alt.Chart(alt.InlineData(data)).encode(
        x=alt.X(
            "x:Q",
            title=TITLES[cost],
            scale=alt.Scale(type="log", base=2, domain=[least, most], nice=False, padding=12),
            axis=alt.Axis(values=_POWERS, labelExpr=label),
        ),
        color=color,
    )
    # In every layer, or a layer without it would have the axis begin at 0.
    scale = alt.Scale(domain=[low, high], nice=False, zero=False, padding=8)
    y = alt.Y("y:Q", title=TITLES[quality], scale=scale)
    joined = base.transform_filter("datum.joined").mark_line(strokeWidth=1).encode(y=y, detail="series:N")
    errors = base.mark_rule(strokeWidth=1).encode(y=alt.Y("low:Q", title=TITLES[quality], scale=scale), y2="high:Q")
    tooltip = [
        alt.Tooltip("method:N", title="method"),
        alt.Tooltip("settings:N", title="settings"),
        alt.Tooltip("shown_value:N", title=TITLES[quality]),
        alt.Tooltip("shown_x:N", title=TITLES[cost]),
    ]
    marks = base.transform_filter("!datum.beyond").mark_point(filled=True, size=90, opacity=1)
    beyond = base.transform_filter("datum.beyond").mark_point(filled=False, size=110, shape="triangle-up", opacity=1)
    layers = [errors, marks.encode(y=y, shape=shape, tooltip=tooltip)]
    # A layer without data would have Vega warn.
    if any(datum["joined"] for datum in data):
        layers.insert(0, joined)
    if any(datum["beyond"] for datum in data):
        layers.append(beyond.encode(y=y, tooltip=tooltip))
    return specification(alt.layer(*layers), f"Points: {TITLES[quality]} against {TITLES[cost]}, one for each setting.")


def _datum(point: Point, cost: str, quality: str) -> dict[str, Any]:
    share, value = getattr(point, cost), getattr(point, quality)
    error = getattr(point, f"{quality}_se")
    return {
        "method": point.method,
        "drawn": _styled(point.method),
        "series": point.series,
        "settings": point.settings or "–",
        "x": share,
        "value": value,
        "error": error or 0.0,
        "shown_value": None if value is None else f"{value:.3f}" + (f" ± {error:.3f}" if error else ""),
        "shown_x": None if share is None else f"{share:.4f}",
    }


def _styled(method: str) -> str:
    """The palette's name for a method, "other" for one that it does not know."""
    style = style_of(method)
    return next((name for name, known in METHOD_STYLES.items() if known == style), "other")
