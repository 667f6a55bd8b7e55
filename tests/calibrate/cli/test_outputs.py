"""Output that cannot be written, or in whose place a file of the user's is: said before a model or a text is opened."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from samples import artifact as sample

from kvcal.artifacts import save
from kvcal.calibrate import cluster_stage, data, models
from kvcal.calibrate.cli import cli
from kvcal.calibrate.cluster_stage import cluster


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "a"
    save(cluster(sample(tokens=60), clusters=2), folder)
    return folder


@pytest.fixture
def here(tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the artifact `a`, other people's files, and nothing that opens a model or a text."""
    shutil.copytree(made, tmp_path / "a")
    for name in ("letter.png", "letter.json", "letter.yaml", "letter.html"):
        (tmp_path / name).write_text('{"dear": "reader"}')
        (tmp_path / f"link{Path(name).suffix}").symlink_to(name)
    for suffix in ("", ".png", ".json", ".yaml", ".html"):
        (tmp_path / f"dangling{suffix}").symlink_to("no/where")
        (tmp_path / f"folder{suffix}").mkdir()
        (tmp_path / f"folder{suffix}" / "x").write_text("theirs")

    def opened(*_: Any, **__: Any) -> None:
        raise AssertionError("work was begun")

    for module, name in ((models, "load_model"), (data, "open_data"), (cluster_stage, "cluster")):
        monkeypatch.setattr(module, name, opened)
    monkeypatch.chdir(tmp_path)
    return tmp_path


PASS = ("--model", "demo", "--data", "stdlib")
FOLDERS = {
    "pca": ("pca", *PASS, "--output"),
    "analyze-rank": ("analyze-rank", *PASS, "--output"),
    "demo": ("demo", "--output"),
    "run": ("run", "--recipe", "recipe.yaml", "--output"),
    "export": ("export", "a", "--model", "demo", "--cla"),
}
FILES = {
    "plot of analyze-rank": (".png", ("analyze-rank", "a", "--plot")),
    "plot of cluster": (".png", ("cluster", "a", "--plot")),
    "plot of share": (".png", ("share", "a", "--model", "demo", "--plot")),
    "plot of evaluate": (".png", ("evaluate", "a", "--data", "stdlib", "--plot")),
    "evaluate": (".json", ("evaluate", "a", "--data", "stdlib", "--output")),
    "plan": (".json", ("plan", "a", "--data", "stdlib", "--output")),
    "recipe": (".yaml", ("recipe", "a", "-o")),
    "report": (".html", ("report", "a", "-o")),
}


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(here: Path, *arguments: str) -> str:
    before = everything(here)
    done = CliRunner().invoke(cli, arguments)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("recipe.yaml: pca")]
    assert done.exit_code == 2 and len(lines) == 1 and lines[0].startswith("Error: "), (done.output, done.exception)
    assert everything(here) == before and not done.stdout
    return lines[0]


@pytest.mark.parametrize("command", FOLDERS)
def test_folders(here: Path, command: str) -> None:
    (here / "recipe.yaml").write_text("recipe: 1\nmodel: demo\ndata: stdlib\n")
    for name, said in {
        "dangling": "is a link",
        "letter.json": "letter.json: ",
        "letter.json/x": "is not a folder",
        "folder": "exists",
        "x" * 250: "File name too long",
        "a/..": "name of its own",
        "/proc/kvcal": "cannot be written",
        "\udcff": "not UTF-8",
    }.items():
        assert said in refused(here, *FOLDERS[command], name), name


@pytest.mark.parametrize("command", FILES)
def test_files(here: Path, command: str) -> None:
    suffix, arguments = FILES[command]
    for name, said in {
        f"dangling{suffix}": "is a link",
        f"link{suffix}": "is a link",
        f"letter{suffix}": "already exists" if command == "recipe" else "and would be lost",
        f"folder{suffix}": "is no plain file",
        f"letter.yaml/x{suffix}": "is not a folder",
        f"no/x{suffix}": "is not a folder",
        f"new{suffix}/": "names a folder",
        f"{'x' * 248}{suffix}": "File name too long",
        f"/proc/kvcal{suffix}": "cannot be written",
        f"\udcff{suffix}": "not UTF-8",
    }.items():
        assert said in refused(here, *arguments, name), name


def test_files_of_the_kind_that_is_written_are_replaced(here: Path, made: Path) -> None:
    (here / "old.png").write_bytes(b"\x89PNG\r\n\x1a\nold")
    assert CliRunner().invoke(cli, ["analyze-rank", "a", "--plot", "old.png"]).exit_code == 0
    assert len((here / "old.png").read_bytes()) > 1000
    (here / "plan.json").write_text(json.dumps({"format": 1, "layers": [None]}))
    (here / "results.json").write_text(json.dumps({"settings": {}, "results": []}))
    for words in (
        "plan a --data stdlib --method loki --output plan.json",
        "evaluate a --data stdlib --output results.json",
    ):
        done = CliRunner().invoke(cli, words.split())
        assert str(done.exception) == "work was begun"


def test_a_plan_in_the_artifact_that_is_none(here: Path) -> None:
    (here / "a" / "plan.json").write_text('{"dear": "reader"}')
    assert "a/plan.json: is there and not a plan" in refused(here, "plan", "a", "--data", "stdlib")


@pytest.mark.parametrize("words", ["cluster a", "share a --model demo", "plan a --data stdlib"])
def test_an_artifact_that_cannot_be_written(here: Path, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    mkdir = Path.mkdir

    def read_only(self: Path, *arguments: Any, **options: Any) -> None:
        if self.absolute().parent == here / "a":
            raise OSError(30, "Read-only file system")
        mkdir(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", read_only)
    assert "Read-only file system" in refused(here, *words.split())


def test_what_stands_where_a_pass_keeps_its_checkpoints(here: Path) -> None:
    (here / "new.partial").write_text("theirs")
    assert "new.partial: is no folder" in refused(here, *FOLDERS["pca"], "new")


def test_a_recipe_is_refused_before_its_pass(here: Path) -> None:
    for stage in ("cluster: {plot: letter.png}", "evaluate: {data: stdlib, output: letter.json}"):
        (here / "recipe.yaml").write_text(f"recipe: 1\nmodel: demo\ndata: stdlib\noutput: new\nstages:\n  - {stage}\n")
        assert "would be lost" in refused(here, "run", "--recipe", "recipe.yaml")


def test_results_that_no_table_can_show(here: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"perplexity": "1"},
        {"bytes_per_step": 0},
        {"scores": [1]},
        {"scores": {"a": "x"}},
        {"sample_scores": {"a": 1}},
        {"scores_by_depth": {"a": {"0.1": "x"}}},
        {"window_nll": ["x"]},
        {"attention_error": 3},
        {"attention_error": ["x"]},
        {"source": ["x"]},
        {"ms_per_step": 10**400},
    ]
    for row in rows:
        (here / "r.json").write_text(json.dumps({"settings": {}, "results": [{"method": "full", **row}]}))
        assert "not a results file" in refused(here, "evaluate", "a", "--data", "stdlib", "--output", "r.json")
