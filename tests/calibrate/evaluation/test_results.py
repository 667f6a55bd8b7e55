import json
import os

import pytest

from kvcal.artifacts import KvcalError
from kvcal.calibrate.evaluation.measurements import Measured
from kvcal.calibrate.evaluation.results import Results
from kvcal.calibrate.evaluation.results_file import compared_rows, parameters

SETTINGS = {
    "model": "m",
    "weights_sha256": "a" * 64,
    "tokens_sha256": "b" * 64,
    "tasks": ("perplexity",),
    "versions": {"torch": "2.11"},
}
LOKI = {"method": "loki", "rank": 0.25, "keep": 0.5}
MEASURED = Measured(2, [1.5, 0.1 + 0.2], [], 10, [3, 4], [0.5], {"0": [0.1, 0.2]}, {"0": [0.9, 0.8]})


def test_what_is_written_is_found_again(tmp_path):
    path = tmp_path / "r.json"
    results = Results.open(SETTINGS, path)
    results.add(LOKI, "perplexity 0+2", MEASURED)
    results.write()
    again = Results.open(SETTINGS, path)
    assert Measured(**again.partial({"keep": 0.5, "rank": 0.25, "method": "loki"})["perplexity 0+2"]) == MEASURED
    assert again.row(LOKI) is None and again.partial({**LOKI, "rank": 1}) == {}
    row = {**LOKI, "perplexity": 3.0, "scores": {}, "ms_per_step": 1.0}
    again.finish(LOKI, row)
    again.write()
    body = json.loads(path.read_text())
    assert body == {"settings": {**SETTINGS, "tasks": ["perplexity"]}, "results": [row]}
    assert parameters(Results.open(SETTINGS, path).row(LOKI)) == LOKI


def test_what_another_process_measured_meanwhile_is_kept(tmp_path):
    path = tmp_path / "r.json"
    here, there = Results.open(SETTINGS, path), Results.open(SETTINGS, path)
    here.add(LOKI, "perplexity 0+2", MEASURED)
    here.write()
    there.finish({"method": "full"}, {"method": "full", "perplexity": 2.0})
    there.add({"method": "h2o"}, "perplexity 0+2", MEASURED)
    there.write()
    here.finish(LOKI, {**LOKI, "perplexity": 3.0})
    here.write()
    body = json.loads(path.read_text())
    assert [row["method"] for row in body["results"]] == ["full", "loki"]
    assert [json.loads(key)["method"] for key in body["partial"]] == ["h2o"]


def test_results_of_other_settings_that_appeared_meanwhile_are_kept(tmp_path):
    path = tmp_path / "r.json"
    here = Results.open(SETTINGS, path)
    other = Results.open({**SETTINGS, "model": "n"}, path)
    other.write()
    before = path.read_bytes()
    with pytest.raises(KvcalError, match="model n there, m asked for"):
        here.write()
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["r.json", "r.json.rank-1"])
def test_a_pipe_is_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(KvcalError, match="is no plain file"):
        Results.open(SETTINGS, tmp_path / "r.json")


def test_settings_by_layer_are_found_again(tmp_path):
    path = tmp_path / "r.json"
    by_layer = {"method": [LOKI, {"method": "full"}]}
    results = Results.open(SETTINGS, path)
    results.finish(by_layer, {**by_layer, "perplexity": 3.0})
    results.write()
    assert Results.open(SETTINGS, path).row(by_layer) == {**by_layer, "perplexity": 3.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, r"\(seed nothing there, 1 asked for\)"),
        ({"tasks": ["passkey"]}, r"\(tasks \['perplexity'\] there, \['passkey'\] asked for\)"),
        ({"model": "n", "versions": {"torch": "3"}}, r"\(model m there, n asked for and 1 more\)"),
        ({"versions": {"torch": "3"}}, r"\(versions.torch 2.11 there, 3 asked for\)"),
    ],
)
def test_a_file_of_other_settings_is_kept(tmp_path, change, message):
    path = tmp_path / "r.json"
    results = Results.open(SETTINGS, path)
    results.finish(LOKI, dict(LOKI))
    results.write()
    before = path.read_bytes()
    with pytest.raises(KvcalError, match=message):
        Results.open({**SETTINGS, **change}, path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b"\xff\xfe",
        b"{}",
        b'{"settings": {}, "results": [1]}',
        b'{"settings": {}, "results": [{}]}',
        b'{"settings": {}, "results": [], "partial": {"a": 1}}',
        b"[" * 100_000,
    ],
)
def test_a_file_of_another_kind_is_kept(tmp_path, content):
    path = tmp_path / "r.json"
    path.write_bytes(content)
    for opened in (lambda: Results.open({}, path), lambda: compared_rows({}, {}, path)):
        with pytest.raises(KvcalError, match="not a results file") as error:
            opened()
        assert "\n" not in str(error.value)
    assert path.read_bytes() == content


def test_a_results_file_that_cannot_be_written(tmp_path):
    with pytest.raises(KvcalError, match="cannot be written"):
        Results(SETTINGS, tmp_path / "nowhere" / "r.json").write()
    with pytest.raises(KvcalError, match=r"nowhere.json: does not exist"):
        compared_rows(SETTINGS, {}, tmp_path / "nowhere.json")


def peers(path, rows, **changes):
    path.write_text(json.dumps({"settings": {**SETTINGS, **changes}, "results": rows}))
    return path


def test_rows_of_peers(tmp_path):
    path = peers(
        tmp_path / "kvpress.json",
        [
            {"method": "SnapKV", "source": "kvpress 0.5.5", "perplexity": 6.0, "bytes_per_step": 5},
            {"method": "loki", "perplexity": 5.0, "perplexity_ratio": 1.5},
        ],
        versions={"torch": "2.6"},
    )
    first, second = compared_rows(SETTINGS, {"perplexity": 4.0}, path)
    assert first["source"] == "kvpress 0.5.5" and first["perplexity_ratio"] == 1.5
    assert second["source"] == "kvpress" and second["perplexity_ratio"] == 1.5


@pytest.mark.parametrize(("name", "message"), [("weights_sha256", "another model"), ("tokens_sha256", "other tokens")])
def test_peers_of_another_model_or_text_are_refused(tmp_path, name, message):
    path = peers(tmp_path / "peers.json", [], **{name: "c" * 64})
    with pytest.raises(KvcalError, match=message):
        compared_rows(SETTINGS, {}, path)
