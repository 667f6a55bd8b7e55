"""Curves by layer, in a sequential colour map with a bar: spectra, and how few centers cover the keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...palette import LAYER_COLORS
from ..fitted import Cover, Spectrum
from .look import specification
from .rank_map import CHOICE


def spectra_figure(found: Sequence[Spectrum]) -> dict[str, Any]:
    data = [
        {"quantity": each.quantity, "layer": each.layer, "at": list(each.dims), "value": list(each.explained)}
        for each in found
    ]
    chart = _curves(data, "dimensions kept", "share of the variance", "linear", percent=True)
    import altair as alt

    chosen = chart.add_params(alt.param(name=CHOICE, value="key_pre"))
    return specification(chosen, "Curves: share of the variance against dimensions kept, one for each layer.")


def covers_figure(found: Sequence[Cover]) -> dict[str, Any]:
    data = [{"layer": each.layer, "at": list(each.clusters), "value": list(each.radius)} for each in found]
    chart = _curves(data, "clusters", "largest radius, of one cluster's", "log", percent=False)
    return specification(chart, "Curves: largest radius against the number of clusters, one for each layer.")


def _curves(data: list[dict[str, Any]], at: str, value: str, scale: str, percent: bool) -> Any:
    """Lines with invisible points on them, which are hovered or touched."""
    import altair as alt

    scales = {"type": "log", "base": 2} if scale == "log" else {"type": "linear"}
    base = alt.Chart(alt.InlineData(data))
    if percent:
        base = base.transform_filter(f"datum.quantity === {CHOICE}")
    base = base.transform_flatten(["at", "value"]).encode(
        x=alt.X("at:Q", title=at, scale=alt.Scale(**scales, nice=False), axis=alt.Axis(tickCount=8)),
        y=alt.Y(
            "value:Q", title=value, scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(format="%" if percent else ".1f")
        ),
        tooltip=[
            alt.Tooltip("layer:Q", title="layer"),
            alt.Tooltip("at:Q", title=at),
            alt.Tooltip("value:Q", title=value, format=".1%" if percent else ".3f"),
        ],
    )
    color = alt.Color(
        "layer:Q",
        title="layer",
        scale=alt.Scale(range=list(LAYER_COLORS)),
        legend=alt.Legend(tickMinStep=1, format="d"),
    )
    lines = base.mark_line(strokeWidth=1.5).encode(color=color, detail="layer:Q", tooltip=alt.TooltipValue(None))
    return lines + base.mark_point(size=120, filled=True, opacity=0)
