"""Numbers by key: found once, or an error that says the key, where it was looked for, and what there is."""

import json

import pytest

from benchmarks.shared.lookup import NotMeasured, load, only, pick, read

ROWS = [
    {"method": "loki", "keep": 0.25, "window_nll": [1.0]},
    {"method": "loki", "keep": 0.25, "rank": 8},
    {"method": "quest", "keep": 0.5},
]


def test_a_key_that_names_one_thing():
    assert only(ROWS, {"method": "quest"}, "") is ROWS[2]
    assert only(ROWS, {"method": "loki", "rank": 8}, "") is ROWS[1]
    assert only(ROWS, {"method": "loki", "rank": None}, "") is ROWS[0]
    assert pick({"a": {"b": 0}}, ("a", "b"), "") == 0


@pytest.mark.parametrize(
    "wanted, said",
    [
        ({"method": "sparq"}, "methods.json: 0 rows have method=sparq; there are method=loki keep=0.25; "),
        ({"method": "loki"}, "2 rows have method=loki; there are method=loki keep=0.25; method=loki keep=0.25 rank=8"),
        ({"method": "quest", "keep": 0.25}, "0 rows have method=quest keep=0.25; there are "),
    ],
    ids=["missing", "ambiguous", "other setting"],
)
def test_a_key_that_names_none_or_several(wanted, said):
    with pytest.raises(NotMeasured) as error:
        only(ROWS, wanted, "methods.json")
    assert said in str(error.value)


def test_a_path_that_ends_early_names_what_there_is():
    with pytest.raises(NotMeasured, match=r"plans\.json: no '1/4'; there are 1/16, 1/8"):
        pick({"2048": {"1/16": 1, "1/8": 2}}, ("2048", "1/4"), "plans.json")
    with pytest.raises(NotMeasured, match=r"plans\.json: no 'rows'; there are a list"):
        pick([1], ("rows",), "plans.json")


def test_a_file_that_is_not_there_names_its_neighbours(tmp_path):
    (tmp_path / "ranks.json").write_text(json.dumps({}))
    assert load(tmp_path / "ranks.json") == {}
    with pytest.raises(NotMeasured, match=r"rank.json: there is no such file in .*; there are ranks"):
        load(tmp_path / "rank.json")
    assert read(tmp_path / "rank.json") == {}


def test_a_file_that_is_no_json_is_named(tmp_path):
    (tmp_path / "ranks.json").write_text('{"a": ')
    for reads in (load, read):
        with pytest.raises(NotMeasured, match=r"ranks.json: not JSON: Expecting value"):
            reads(tmp_path / "ranks.json")
