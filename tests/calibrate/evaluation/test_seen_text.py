"""Whether an evaluation reads what was calibrated on."""

from __future__ import annotations

import pytest

from kvcal.calibrate.data import open_data
from kvcal.calibrate.evaluation.seen_text import overlap


@pytest.fixture
def texts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/one.txt", "a/two.md", "b/three.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("some text")
    (tmp_path / "link").symlink_to("a")
    return tmp_path


def named(*specs):
    return open_data([str(spec) for spec in specs]).source


@pytest.mark.parametrize(
    ("calibrated", "evaluated", "seen"),
    [
        (["a/one.txt"], ["a/one.txt"], "one.txt"),
        (["a"], ["a/two.md"], "two.md"),
        (["a/*.txt"], ["link/one.txt"], "one.txt"),
        (["b", "a/two.md"], ["a"], "two.md"),
        (["a/one.txt"], ["a/two.md"], None),
        (["a"], ["b"], None),
        (["stdlib:train"], ["stdlib:train"], "stdlib"),
        (["stdlib:train"], ["stdlib:heldout"], None),
        (["a", "stdlib"], ["stdlib"], "stdlib"),
    ],
)
def test_by_file_and_split(texts, calibrated, evaluated, seen):
    assert overlap({"source": named(*calibrated)}, named(*evaluated)) == seen


def test_an_absolute_path_is_the_relative_one(texts):
    assert overlap({"source": named(texts / "a")}, named("a/one.txt")) == "one.txt"


def test_what_says_nothing_of_its_source():
    for data in ({}, {"source": None}, {"source": {}}, {"source": {"id": "given"}}):
        assert overlap(data, {"ruler": {}}) is None
