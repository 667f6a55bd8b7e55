import itertools

import pytest
from architectures import build

from kvcal.artifacts import KvcalError
from kvcal.calibrate.evaluation.grid import check_grid, make_grid, parse_assignments, parse_values


def test_values_mean_what_they_look_like():
    found = parse_values("32, .25,1.0,1,variance:0.9,true,FALSE,group")
    expected = [32, 0.25, 1.0, 1, "variance:0.9", True, False, "group"]
    assert found == expected and [type(value) for value in found] == [type(value) for value in expected]


def test_assignments_are_lists_by_name():
    assert parse_assignments(["basis=pca,score", "page=8"]) == {"basis": ["pca", "score"], "page": [8]}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["basis"], "a name and a value"),
        (["=3"], "a name and a value"),
        (["page=8", "page=16"], "twice"),
        (["page="], "empty"),
        (["page=1,,2"], "empty"),
    ],
)
def test_assignments_of_another_form(texts, message):
    with pytest.raises(KvcalError, match=message):
        parse_assignments(texts)


def test_a_grid_is_the_product_over_what_each_method_has():
    grid = make_grid(
        ["loki", "streaming", "full"], {"rank": [0.25, 8], "keep": [0.5, 0.25, 64], "basis": ["pca", "score"]}
    )
    assert grid[0] == {"method": "full"} and grid.count({"method": "full"}) == 1
    loki = [setting for setting in grid if setting["method"] == "loki"]
    expected = itertools.product([0.25, 8], [0.5, 0.25, 64], ["pca", "score"])
    assert [(s["rank"], s["keep"], s["basis"]) for s in loki] == list(expected)
    assert [s for s in grid if s["method"] == "streaming"] == [
        {"method": "streaming", "keep": keep} for keep in (0.5, 0.25, 64)
    ]
    assert len(grid) == 1 + 12 + 3


def test_rank_and_keep_are_stated_when_not_given():
    assert make_grid(["loki", "quest"], {}) == [
        {"method": "full"},
        {"method": "loki", "rank": 0.25, "keep": 0.25},
        {"method": "quest", "keep": 0.25},
    ]


def test_dense_layers_go_with_every_method_but_full():
    grid = make_grid(["full", "streaming"], {"dense_layers": [1]})
    assert grid == [{"method": "full"}, {"method": "streaming", "keep": 0.25, "dense_layers": 1}]


@pytest.mark.parametrize(
    ("methods", "parameters", "message"),
    [
        (["lokki"], {}, "no method 'lokki': did you mean loki. choose among full, spectral, loki"),
        ([], {}, "choose among"),
        (["streaming", "h2o"], {"rank": [0.25]}, "no parameter 'rank' in streaming, h2o: they have dense_below"),
        (["loki"], {"bassis": ["pca"]}, "no parameter 'bassis'"),
    ],
)
def test_unknown_names(methods, parameters, message):
    with pytest.raises(KvcalError, match=message):
        make_grid(methods, parameters)


@pytest.mark.parametrize("parameters", [{"keep": [0.5, 0.0]}, {"keep": [0.5, -3]}, {"keep": [1.5]}, {"sinks": ["a"]}])
def test_every_setting_is_checked_before_the_first_is_run(parameters):
    model = build("llama")
    calls = []
    model.register_forward_pre_hook(lambda *args: calls.append(args))
    with pytest.raises(KvcalError):
        check_grid(make_grid(["streaming"], parameters), model, None)
    assert not calls
