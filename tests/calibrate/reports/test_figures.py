"""Specifications of the report's figures: colours of the palette, lines from three points on, names as data only."""

from __future__ import annotations

import dataclasses
import json

import pytest

from kvcal.calibrate.palette import FALLBACK, METHOD_STYLES
from kvcal.calibrate.reports.figures.look import symbol
from kvcal.calibrate.reports.figures.plan_figure import plan_figure
from kvcal.calibrate.reports.figures.quality import legend, quality_figure
from kvcal.calibrate.reports.measured import Point
from kvcal.calibrate.reports.planned import Plan, Planned


def point(method, read, ratio=1.0, **more):
    return Point(method, method, more.pop("settings", ""), read, None, ratio, None, None, None)


def rows_of(specification):
    (rows,) = specification["datasets"].values() if "datasets" in specification else [specification["data"]["values"]]
    return rows


def test_methods_have_the_palettes_colours_and_markers():
    points = [point(name, 0.5) for name in METHOD_STYLES] + [point("SnapKV (peer)", 0.5), point("new", 0.5)]
    shown = {each.name: (each.color, each.path) for each in legend(points)}
    assert shown == {
        name: (style.color, symbol(style.marker)) for name, style in {**METHOD_STYLES, "other": FALLBACK}.items()
    }
    specification = quality_figure(points, "read", "ratio")
    (scale,) = {json.dumps(layer["encoding"]["color"]["scale"], sort_keys=True) for layer in specification["layer"]}
    colors = dict(zip(json.loads(scale)["domain"], json.loads(scale)["range"], strict=True))
    assert colors == {name: color for name, (color, _) in shown.items()}
    drawn = {row["method"]: row["drawn"] for row in rows_of(specification)}
    assert drawn["SnapKV (peer)"] == "snapkv" and drawn["new"] == "other" and drawn["loki"] == "loki"


def test_markers_are_paths_within_a_square():
    paths = {symbol(style.marker) for style in (*METHOD_STYLES.values(), FALLBACK)}
    assert len(paths) == len(METHOD_STYLES) + 1
    for path in paths:
        numbers = [
            float(number)
            for number in path.replace("M", " ").replace("L", " ").replace("Z", " ").replace(",", " ").split()
        ]
        assert max(map(abs, numbers)) == pytest.approx(1)


@pytest.mark.parametrize(
    ("reads", "joined"), [((0.1, 0.2), False), ((0.1, 0.2, 0.4), True), ((0.1, 0.1, 0.105), False)]
)
def test_a_line_is_drawn_from_three_points_of_several_costs_on(reads, joined):
    specification = quality_figure([point("full", 1.0), *(point("loki", read) for read in reads)], "read", "ratio")
    assert {row["joined"] for row in rows_of(specification) if row["method"] == "loki"} == {joined}


def test_what_loses_too_much_is_at_the_edge():
    points = [point("full", 1.0), *(point("loki", 0.1 * at, 1.01) for at in (1, 2, 4)), point("h2o", 0.1, 50.0)]
    specification = quality_figure(points, "read", "ratio")
    rows = {row["method"]: row for row in rows_of(specification)}
    scales = [layer["encoding"]["y"]["scale"] for layer in specification["layer"]]
    assert len(scales) == 4 and all(scale == scales[0] and not scale["zero"] for scale in scales)
    assert scales[0]["domain"][0] < 1 and scales[0]["domain"][1] == rows["h2o"]["y"]
    assert rows["h2o"]["beyond"] and 1.1 <= rows["h2o"]["y"] <= 2 and not rows["loki"]["beyond"]
    assert rows["h2o"]["shown_value"] == "50.000"


def test_no_figure_without_data():
    assert quality_figure([point("full", None)], "read", "ratio") is None
    assert (
        quality_figure([point("full", 1.0)], "held", "ratio")
        is quality_figure([point("full", 1.0)], "read", "score")
        is None
    )
    planned = Planned(0, "loki", "", None, None)
    assert plan_figure(Plan((planned,), "", None, ())) is None
    assert plan_figure(Plan((dataclasses.replace(planned, error=0.5),), "", None, ())) is not None


def test_names_are_values_of_the_data_and_nothing_else():
    strange = "datum['x']] <b> {{signal}}"
    specification = quality_figure([point(strange, 0.5, settings=strange)], "read", "ratio")
    rows = rows_of(specification)
    assert rows[0]["method"] == rows[0]["settings"] == strange
    rows.clear()
    assert "signal}}" not in json.dumps(specification)
