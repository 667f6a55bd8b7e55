"""A heat map of rank@90 by layer and head, for a quantity that is chosen on the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..fitted import Rank
from .look import specification

CHOICE = "quantity"
"""The parameter of the figures that the page's selections set."""


def rank_map(found: Sequence[Rank]) -> dict[str, Any]:
    import altair as alt

    data = [
        {"quantity": rank.quantity, "layer": rank.layer, "head": rank.head, "rank": rank.rank, "of": rank.dims}
        for rank in found
    ]
    layers = len({rank.layer for rank in found})
    chart = (
        alt.Chart(alt.InlineData(data))
        .add_params(alt.param(name=CHOICE, value="key_pre"))
        .transform_filter(f"datum.quantity === {CHOICE}")
        .mark_rect(stroke="var(--ground)", strokeWidth=0.5 if layers > 16 else 1)
        .encode(
            x=alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
            y=alt.Y("head:O", title="KV head", sort="ascending"),
            color=alt.Color(
                "rank:Q",
                title="dimensions",
                scale=alt.Scale(scheme="viridis", domain=[1, max(rank.dims for rank in found)]),
            ),
            tooltip=[
                alt.Tooltip("layer:O", title="layer"),
                alt.Tooltip("head:O", title="KV head"),
                alt.Tooltip("rank:Q", title="dimensions for 90 %"),
                alt.Tooltip("of:Q", title="of"),
            ],
        )
    )
    return specification(chart, "Heat map: dimensions that hold 90 % of the variance, by layer and KV head.")
