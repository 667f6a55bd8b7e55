import struct

from hypothesis import given
from hypothesis import strategies as st

from kvcal.calibrate.evaluation.figure import evaluation_figure, pareto_front, series_of, varied_settings
from kvcal.calibrate.evaluation.rows import mean_score

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
