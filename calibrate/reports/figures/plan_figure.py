"""What a plan loses in each layer, in the colours of the methods that it chose."""

from __future__ import annotations

from typing import Any

from ...palette import FALLBACK, METHOD_STYLES, style_of
from ..planned import Plan
from .look import specification


def plan_figure(found: Plan) -> dict[str, Any] | None:
    """None: the plan states no errors."""
    import altair as alt

    data = [
        {
            "layer": layer.layer,
            "method": layer.method,
            "settings": layer.settings or "–",
            "error": layer.error,
            "bytes": "–" if layer.bytes is None else f"{100 * layer.bytes:.2f} %",
            "color": style_of(layer.method).color,
        }
        for layer in found.layers
        if layer.error is not None
    ]
    if not data:
        return None
    colors = [style.color for style in (*METHOD_STYLES.values(), FALLBACK)]
    chart = (
        alt.Chart(alt.InlineData(data))
        .mark_bar()
        .encode(
            x=alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
            y=alt.Y("error:Q", title="error of the attention output"),
            color=alt.Color("color:N", scale=alt.Scale(domain=colors, range=colors), legend=None),
            tooltip=[
                alt.Tooltip("layer:O", title="layer"),
                alt.Tooltip("method:N", title="method"),
                alt.Tooltip("settings:N", title="settings"),
                alt.Tooltip("error:Q", title="error", format=".3f"),
                alt.Tooltip("bytes:N", title="bytes, of dense attention's"),
            ],
        )
    )
    return specification(chart, "Bars: error of the attention output in each planned layer.")
