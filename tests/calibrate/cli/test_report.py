"""`calibrate report` as a user runs it; the page itself is tested in tests/calibrate/reports."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_runs import refused, run
from report_samples import artifact, results


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    results(tmp_path / "r.json", artifact(tmp_path / "a"))
    results(tmp_path / "other.json", None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_report_of_several_results_replaces_an_earlier_one(here: Path) -> None:
    run("report", "a")
    alone = (here / "report.html").read_text("utf-8")
    assert "calibrate evaluate ARTIFACT --output results.json" in alone
    done = run("report", "a", "r.json", "other.json")
    assert done.stdout == "report: report.html\n"
    page = (here / "report.html").read_text("utf-8")
    assert "Measured with this artifact" in page and "Measured with another model" in page and page != alone


def test_the_same_page_from_the_same_files(here: Path) -> None:
    for name in ("one.html", "two.html"):
        run("report", "a", "r.json", "-o", name)
    assert (here / "one.html").read_bytes() == (here / "two.html").read_bytes()


def test_what_is_no_results_file_is_refused_and_nothing_is_written(here: Path) -> None:
    (here / "note.json").write_text('{"dear": "reader"}')
    (here / "empty.json").write_text("")
    for name in ("note.json", "empty.json", "no.json", "a", "a/manifest.json"):
        assert refused("report", "a", "r.json", name).startswith(f"Error: {name}: ")
    (here / "r.predictions.jsonl").write_text('{"dear": "reader"}\n')
    assert "r.predictions.jsonl" in refused("report", "a", "r.json")
    assert refused("report", "r.json").startswith("Error: r.json")
    assert not (here / "report.html").exists()


def test_other_files_are_not_replaced(here: Path) -> None:
    (here / "report.html").write_text("<p>Dear reader</p>")
    assert "would be lost" in refused("report", "a")
    assert "ends in .html" in refused("report", "a", "-o", "report.txt")
    assert (here / "report.html").read_text() == "<p>Dear reader</p>"
