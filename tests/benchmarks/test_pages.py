"""The pages of results are those of the data that lie here, and every command that documents name starts."""

import json
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks import pages

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
TYPED = {"1.01", "1.10", "1.6", ".045", "4.2"}
"""An example, an aim, a bound by the sizes of what is held, a setting, and millions of the demo model's parameters."""
ROOMS = sorted(path.parent.name for path in BENCHMARKS.glob("*/__main__.py"))


def test_no_page_is_older_than_its_data(capsys):
    assert pages.main(["--check"]) == 0, capsys.readouterr().err


@pytest.fixture
def changed(tmp_path, monkeypatch):
    """Changes a copy of what was decoded at equal bytes, and gives the pages of it."""
    results, docs = tmp_path / "results", tmp_path / "docs" / "results"
    shutil.copytree(pages.RESULTS, results)
    shutil.copytree(pages.PAGES, docs)
    monkeypatch.setattr(pages, "RESULTS", results)
    monkeypatch.setattr(pages, "PAGES", docs)
    monkeypatch.setattr(pages, "ALL", (pages.REAL,))
    path = results / "real" / "smollm2-135m-methods-2048.json"

    def change(edit):
        body = json.loads(path.read_text())
        edit(body["results"])
        path.write_text(json.dumps(body))

    return change


def an_eighth(rows):
    (row,) = [row for row in rows if row["method"] == "spectral" and row["keep"] == 0.13986]
    return row


def test_a_number_that_changed_makes_the_page_and_its_figure_old(changed, capsys):
    changed(lambda rows: an_eighth(rows).update(perplexity_ratio=1.25))
    assert pages.main(["--check"]) == 1
    assert "older than data or template: real.md, real.png: run python -m benchmarks.pages" in capsys.readouterr().err


def test_a_number_that_is_gone_is_named(changed, capsys):
    changed(lambda rows: rows.remove(an_eighth(rows)))
    assert pages.main([]) == 1
    said = capsys.readouterr().err
    assert "smollm2-135m-methods-2048.json at 1/8: 0 rows have method=spectral; there are method=" in said


def test_a_number_that_is_there_twice_is_named(changed, capsys):
    changed(lambda rows: rows.append(an_eighth(rows)))
    assert pages.main(["--check"]) == 1
    assert "smollm2-135m-methods-2048.json at 1/8: 2 rows have method=spectral; there are" in capsys.readouterr().err


def test_links_lead_to_headings_and_files():
    """Of the pages, and from other documents into them; headings are named as GitHub does."""
    sources = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), BENCHMARKS / "README.md"]
    for source in sources:
        for target, heading in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", source.read_text()):
            path = (source.parent / target).resolve() if target else source
            assert path.exists(), (source, target)
            if heading and path.suffix == ".md":
                titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
                named = {re.sub(r"[^a-z0-9_ -]", "", title.lower()).replace(" ", "-") for title in titles}
                assert heading in named, (source, target, heading)


def test_no_measured_number_is_typed_into_a_template():
    """Numbers with a fraction come from the data, but for those of TYPED."""
    for template in BENCHMARKS.glob("*/*.j2"):
        words = re.sub(r"\{\{.*?\}\}|\{%.*?%\}", "", template.read_text(), flags=re.DOTALL)
        assert set(re.findall(r"\d*\.\d+", words)) <= TYPED, template


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_is_in_the_table(room):
    """With its command and where its data lie, or that it has none."""
    table = [line for line in (BENCHMARKS / "README.md").read_text().splitlines() if line.startswith("| ")]
    assert any(f"`python -m benchmarks.{room}" in line for line in table)


def test_commands_that_documents_name_exist():
    named = set()
    for path in (ROOT / "Makefile", *ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *BENCHMARKS.rglob("*.md")):
        text = path.read_text()
        named |= set(re.findall(r"python -m (benchmarks(?:\.\w+)+)", text))
        assert not re.search(r"python benchmarks/", text), path
    assert "benchmarks.real" in named
    for name in named:
        assert find_spec(name) is not None, name


@pytest.mark.parametrize("name", [*ROOMS, "pages"])
def test_every_command_tells_what_it_does(name):
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "python -m benchmarks" in done.stdout, done.stderr
