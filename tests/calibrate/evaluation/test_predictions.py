"""Predictions beside the results: each once, and none lost of a setting that has a row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvcal.artifacts import KvcalError
from kvcal.calibrate.evaluation import predictions
from kvcal.calibrate.evaluation import results as results_module
from kvcal.calibrate.evaluation.grid import key_of
from kvcal.calibrate.evaluation.measurements import Measured
from kvcal.calibrate.evaluation.predictions import beside
from kvcal.calibrate.evaluation.results import Results

SETTINGS = {"model": "m"}
FULL, LOKI = {"method": "full"}, {"method": "loki", "keep": 0.5}


def measured(*said: str, first: int = 0) -> Measured:
    samples = [
        {"index": first + at, "prediction": text, "answers": ["7"], "score": 0.0, "depth": None}
        for at, text in enumerate(said)
    ]
    return Measured(len(said), [], samples, 10, [3], [0.5])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in beside(path).read_text("utf-8").split("\n") if line]


def finish(results: Results, setting: dict[str, Any], *said: str) -> None:
    results.add(setting, f"asked 0+{len(said)}", measured(*said))
    results.finish(setting, {**setting, "scores": {}, "ms_per_step": 1.0})
    results.write()


def test_names():
    assert beside(Path("a/r.json")) == Path("a/r.predictions.jsonl")
    assert beside(Path("a/r.v2")) == Path("a/r.v2.predictions.jsonl")


def test_a_line_for_each_sample_in_the_order_of_rows_and_samples(tmp_path):
    path = tmp_path / "r.json"
    results = Results.open(SETTINGS, path)
    results.add(FULL, "asked 2+1", measured("c", first=2))
    results.add(FULL, "asked 0+2", measured("a", "b"))
    results.write()
    assert not beside(path).exists()  # nothing is finished
    results.finish(FULL, {**FULL, "scores": {}})
    results.write()
    finish(results, LOKI, "x")
    assert [(line["setting"], line["task"], line["index"], line["prediction"]) for line in lines(path)] == [
        *((FULL, "asked", at, text) for at, text in enumerate("abc")),
        (LOKI, "asked", 0, "x"),
    ]
    assert "predictions" not in json.loads(path.read_text())


@pytest.mark.parametrize("text", ["a\u2028b\x85c\nd\r", "half \ud83d", 'quo"te', "[ 1,\n 2 ]"])
def test_whatever_was_said_is_one_line(tmp_path, text):
    path = tmp_path / "r.json"
    finish(Results.open(SETTINGS, path), FULL, text, "b")
    assert [line["prediction"] for line in lines(path)] == [text, "b"]
    results = Results.open(SETTINGS, path)
    finish(results, LOKI, "c")
    assert [line["prediction"] for line in lines(path)] == [text, "b", "c"]


def test_what_another_process_finished_meanwhile_is_kept(tmp_path):
    path = tmp_path / "r.json"
    here, there = Results.open(SETTINGS, path), Results.open(SETTINGS, path)
    finish(there, FULL, "a", "b")
    finish(here, LOKI, "c")
    finish(there, {"method": "h2o"}, "d")
    assert [line["prediction"] for line in lines(path)] == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    "of", [(results_module, "write_atomically"), (predictions, "write_atomically")], ids=["results", "predictions"]
)
def test_a_crash_at_either_file_leaves_no_row_without_its_predictions(tmp_path, monkeypatch, of):
    path = tmp_path / "r.json"
    results = Results.open(SETTINGS, path)
    results.add(FULL, "asked 0+1", measured("a"))
    results.write()
    with monkeypatch.context() as patched:
        patched.setattr(*of, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            finish(results, FULL, "a")
    again = Results.open(SETTINGS, path)
    assert again.row(FULL) is None and list(again.partial(FULL)) == ["asked 0+1"]
    again.finish(FULL, {**FULL, "scores": {}})
    again.write()
    assert [line["prediction"] for line in lines(path)] == ["a"]


def test_predictions_whose_results_were_removed_go(tmp_path):
    path = tmp_path / "r.json"
    finish(Results.open(SETTINGS, path), FULL, "a")
    path.unlink()
    other = Results.open({"model": "n"}, path)
    other.write()
    assert lines(path) == []
    finish(other, LOKI, "b")
    assert [line["prediction"] for line in lines(path)] == ["b"]


@pytest.mark.parametrize("content", ["mine\n", "[1]\n", '{"setting": {}}\n'])
def test_a_file_of_another_kind_in_the_place_of_predictions_is_kept(tmp_path, content):
    path = tmp_path / "r.json"
    beside(path).write_text(content)
    with pytest.raises(KvcalError, match="is there and not predictions of an evaluation, and would be lost"):
        Results.open(SETTINGS, path)
    assert beside(path).read_text() == content and not path.exists()


def test_results_of_an_earlier_version_are_told_apart(tmp_path):
    path = tmp_path / "r.json"
    for more in (
        {"results": [{**FULL, "recall": {"passkey@64": 1.0}}]},
        {"results": [], "partial": {key_of(FULL): {"passkey@64 0+2": {"nll": [1.0], "exact": [True]}}}},
    ):
        path.write_text(json.dumps({"settings": SETTINGS, **more}))
        before = path.read_bytes()
        with pytest.raises(KvcalError, match=r"of an earlier kvcal, .* choose another --output, or remove it") as error:
            Results.open(SETTINGS, path)
        assert "\n" not in str(error.value) and path.read_bytes() == before


def test_lists_of_numbers_stand_in_one_line(tmp_path):
    path = tmp_path / "r.json"
    results = Results.open({**SETTINGS, "words": ["a", "b"], "lengths": [64, 128]}, path)
    row = {**FULL, "window_nll": [1.5, -2e-7, None], "sample_scores": {"[ 1,\n 2 ]": [1.0]}, "attention_error": []}
    results.finish(FULL, row)
    results.write()
    text = path.read_text()
    assert json.loads(text)["results"] == [row]
    assert '"window_nll": [1.5, -2e-07, null],' in text and '"lengths": [64, 128]' in text
