import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcal.calibrate.evaluation.axes import LEAST_SPAN, MOST_RATIO, ratio_limits
from kvcal.calibrate.evaluation.figure import (
    draw_evaluation,
    evaluation_figure,
    pareto_front,
    series_of,
    varied_settings,
)
from kvcal.calibrate.evaluation.rows import mean_score
from kvcal.calibrate.palette import FALLBACK, METHOD_STYLES
from kvcal.calibrate.plots import plain_name
from kvcal.runtime import METHODS

POINTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12)


@given(POINTS)
def test_the_pareto_front_is_what_no_point_dominates(points):
    def dominated(point):
        return any(a <= point[0] and b <= point[1] and (a, b) != point for a, b in points)

    front = pareto_front(points)
    assert sorted(front) == [index for index, point in enumerate(points) if not dominated(point)]
    assert [points[index][0] for index in front] == sorted(points[index][0] for index in front)


def row(method, cost, ratio=None, scores=None, **more):
    return {"method": method, "bytes_per_step": cost, "perplexity_ratio": ratio, "scores": scores or {}, **more}


def test_the_mean_score_is_over_tasks_that_were_run():
    """Errors of independent samples add up as squares: √(.3² + .4²) / 2."""
    found = {"scores": {"a@1": 1.0, "b@1": 0.5, "c@1": None}, "scores_se": {"a@1": 0.3, "b@1": 0.4}}
    assert mean_score(found) == (0.75, 0.25) and mean_score(found, tasks=["b@1"]) == (0.5, 0.4)
    assert mean_score({"scores": {}}) == mean_score({}) == (None, None)


def test_series_are_methods_with_their_choices_and_their_origin():
    assert series_of(row("loki", 1, rank=0.25, keep=0.5, basis="score", select="group")) == "loki score group"
    assert series_of(row("loki", 1, rank="variance:0.9", keep=64)) == "loki"
    assert series_of(row("SnapKV", 1, source="kvpress 0.5.5")) == "SnapKV (kvpress 0.5.5)"


def test_settings_that_vary_are_series_of_their_own():
    rows = [row("clusterkv", 1, keep=keep, tail=tail, sinks=4) for tail in (False, True) for keep in (8, 16)]
    varied = varied_settings([*rows, row("subgen", 1, sinks=2)])
    assert varied == {"tail"}  # sinks differ between methods only
    assert {series_of(each, varied) for each in rows} == {"clusterkv tail False", "clusterkv tail True"}


def test_a_figure_for_whatever_was_evaluated():
    settings = {"model": "m", "prefix": 64}
    both = [row("full", 100, 1.0, {"a@64": 1.0}), row("loki", 30, 1.02, {"a@64": 0.9}, rank=0.25)]
    peers = [*both, row("SnapKV", 25, None, {"a@64": 0.8}, source="kvpress 0.5.5"), row("none", None, 1.1)]
    only_recall = [row("full", 100, None, {"a@64": 1.0})]
    only_perplexity = [row("full", 100, 1.0), row("loki", 30, 1.02)]
    free = [row("full", None, 1.0), row("loki", None, 1.02)]
    figures = [evaluation_figure(settings, rows) for rows in (both, peers, only_recall, only_perplexity, free)]
    assert all(figure.startswith(b"\x89PNG") for figure in figures) and len(set(figures)) == 5
    assert evaluation_figure(settings, both) == figures[0]


def test_quality_is_drawn_against_what_is_read_and_below_against_what_is_held():
    settings = {"model": "m", "prefix": 64}
    held = [row("full", 100, 1.0, resident_bytes=80), row("h2o", 30, 1.1, resident_bytes=20)]
    figures = {}
    for name, rows in (("both", held), ("read", [{**each, "resident_bytes": None} for each in held])):
        figures[name] = struct.unpack(">II", evaluation_figure(settings, rows)[16:24])  # width and height of a PNG
    assert figures["both"][0] == figures["read"][0] and figures["both"][1] > 1.8 * figures["read"][1]


def drawn(rows, most_ratio=None):
    """(axes of perplexity, lines in it by label)"""
    figure, _ = draw_evaluation({"model": "m", "prefix": 64}, rows, most_ratio)
    axes = figure.axes[0]
    lines = {container.get_label(): container.lines[0] for container in axes.containers}
    return axes, lines | {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}


def test_a_method_keeps_its_colour_and_marker_whatever_else_is_drawn():
    alone = [row("full", 100, 1.0), row("loki", 30, 1.02)]
    beside = [row("full", 100, 1.0), *(row(name, 20, 1.01) for name in METHODS if name not in ("full", "loki"))]
    for rows in (alone, [*beside, alone[1]], [alone[0], row("other", 5, 1.0), alone[1]]):
        loki = drawn(rows)[1]["loki"]
        assert (loki.get_color(), loki.get_marker()) == (METHOD_STYLES["loki"].color, METHOD_STYLES["loki"].marker)
    assert drawn([alone[0], row("other", 5, 1.0)])[1]["other"].get_color() == FALLBACK.color


@pytest.mark.parametrize(("points", "joined"), [(1, False), (2, False), (3, True), (4, True)])
def test_lines_are_drawn_from_three_points_on(points, joined):
    rows = [row("full", 100, 1.0), *(row("loki", 10 * 2**at, 1.3 - 0.05 * at, keep=at) for at in range(points))]
    _, lines = drawn(rows)
    assert (lines["loki"].get_linestyle() == "-") == joined
    assert ("Pareto front" in lines) == (points + 1 >= 3)  # `full`, which nothing beats, is on it, too


def test_a_loss_of_one_percent_is_no_cliff():
    axes, _ = drawn([row("full", 100, 1.0), row("loki", 30, 1.01), row("h2o", 20, 1.012)])
    low, most = axes.get_ylim()
    assert low < 1 and most >= 1.1


def test_what_loses_too_much_is_marked_at_the_edge_and_does_not_squeeze_the_others():
    rows = [row("full", 100, 1.0), *(row("loki", 10 + at, 1.01 + at / 100, keep=at) for at in range(4))]
    axes, lines = drawn([*rows, row("h2o", 20, 57.0)])
    most = axes.get_ylim()[1]
    assert 1.04 < most <= 2
    mark = lines["beyond the panel, at these values"]
    assert (mark.get_xdata()[0], mark.get_ydata()[0]) == (0.2, most) and not mark.get_clip_on()
    assert mark.get_color() == METHOD_STYLES["h2o"].color
    assert [text.get_text() for text in axes.texts] == ["57"]
    several = [*rows, row("h2o", 20, 57.0), row("snapkv", 22, 3.0), row("streaming", 80, 1e9)]
    assert [text.get_text() for text in drawn(several)[0].texts] == ["3–57", "1e+09"]
    assert drawn(rows, 3.0)[0].get_ylim()[1] == 3.0


@given(st.lists(st.floats(0.5, 1e6), min_size=1, max_size=20))
def test_the_axis_of_ratios_has_a_span_and_an_end(ratios):
    low, most = ratio_limits(ratios)
    assert low < min(1, *ratios, 1) and 1 + LEAST_SPAN <= most <= MOST_RATIO


def test_titles_name_models_and_texts_without_paths():
    rows = [row("full", 100, 1.0)]
    for model in ("/models/tiny", "models/tiny/", "org/tiny", "C:\\models\\tiny", "tiny"):
        assert draw_evaluation({"model": model, "prefix": 64}, rows)[1].startswith("tiny, prefix 64")
    assert plain_name("/a/b.txt + org/wiki + stdlib") == "b.txt + wiki + stdlib" and plain_name("/") == "text"
