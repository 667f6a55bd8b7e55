"""--force replaces an artifact, results or a recipe, and nothing else; the old one stays until the new one is whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from cli_runs import invoke, refused, run

from kvcal.artifacts import load
from kvcal.artifacts.manifest import MANIFEST

TEXT = "The quick brown fox jumps over the lazy dog. " * 60
SMALL = ("--num-tokens", 256, "--seq-len", 64)


@pytest.fixture(scope="module")
def given(tmp_path_factory, tiny_model_folder):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return ("--model", tiny_model_folder, "--data", path)


@pytest.fixture(scope="module")
def made(tmp_path_factory, given):
    folder = tmp_path_factory.mktemp("made") / "a"
    run("pca", *given, "--output", folder, *SMALL)
    return folder


@pytest.fixture
def artifact(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "a"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_another_run_takes_the_artifact_s_place(artifact, given, tmp_path) -> None:
    (artifact / "plan.json").write_text("{}")
    (artifact / "notes.txt").write_text("the user's own")
    other = ("pca", *given, *SMALL, "--seed", 7, "--output")
    assert "add --force to replace it" in refused(*other, artifact)
    run(*other, artifact, "--force")
    run(*other, tmp_path / "straight")
    found, straight = contents(artifact), contents(tmp_path / "straight")
    assert found.pop("notes.txt") == b"the user's own", "only what the artifact had goes"
    assert found == straight
    run("verify", artifact)


def test_the_same_run_is_left_as_it_is_with_its_later_stages(artifact, given) -> None:
    run("cluster", artifact, "--clusters", 4)
    before = contents(artifact)
    assert "already calibrated" in run("pca", *given, *SMALL, "--output", artifact, "--force").stderr
    assert contents(artifact) == before


def test_a_damaged_artifact_is_replaced(artifact, made, given) -> None:
    next(artifact.glob("pca.*")).write_bytes(b"damaged")
    refused("pca", *given, *SMALL, "--output", artifact)
    run("pca", *given, *SMALL, "--output", artifact, "--force")
    assert contents(artifact) == contents(made)


def test_a_failure_leaves_the_old_one_whole(artifact, given, monkeypatch) -> None:
    before = contents(artifact)

    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kvcal.artifacts.folder.manifest_bytes", full)
    done = invoke("pca", *given, *SMALL, "--seed", 7, "--output", artifact, "--force")
    assert done.exit_code == 2 and "No space left" in done.stderr
    assert contents(artifact) == before and not list(artifact.parent.glob(".kvcal*"))


@pytest.mark.parametrize("what", ["folder", "file", "link", "manifest of another"])
def test_nothing_but_an_artifact_is_replaced(artifact, given, tmp_path, what: str) -> None:
    place = tmp_path / "there"
    if what == "file":
        place.write_text("years of work")
    elif what == "link":
        place.symlink_to(artifact)
    else:
        place.mkdir()
        (place / ("thesis.tex" if what == "folder" else MANIFEST)).write_text('{"name": "a web app"}')
    kept, theirs = contents(artifact), place.read_bytes() if what == "file" else contents(place)
    refused("pca", *given, *SMALL, "--seed", 7, "--output", place, "--force")
    assert (place.read_bytes() if what == "file" else contents(place)) == theirs and contents(artifact) == kept


def test_results_of_other_settings(artifact, given, tmp_path) -> None:
    def evaluate(*more: object) -> tuple[object, ...]:
        options = ("--prefix", 32, "--continuation", 4, "--tasks", "perplexity", "--method", "streaming")
        return ("evaluate", artifact, *given, *options, "--output", tmp_path / "r.json", *more)

    run(*evaluate("--windows", 1))
    before = (tmp_path / "r.json").read_bytes()
    assert "add --force to replace it" in refused(*evaluate("--windows", 2))
    assert (tmp_path / "r.json").read_bytes() == before
    run(*evaluate("--windows", 2, "--force"))
    assert json.loads((tmp_path / "r.json").read_text())["settings"]["windows"] == 2
    (tmp_path / "r.json").write_text('{"dear": "reader"}')
    assert "not a results file" in refused(*evaluate("--force"))
    assert (tmp_path / "r.json").read_text() == '{"dear": "reader"}'


def test_a_recipe(artifact, tmp_path) -> None:
    path = tmp_path / "r.yaml"
    run("recipe", artifact, "-o", path)
    written = path.read_bytes()
    path.write_text("recipe: 1\nmodel: demo\ndata: stdlib\n")
    assert "already exists: choose another name, or give --force to replace a recipe" in refused(
        "recipe", artifact, "-o", path
    )
    run("recipe", artifact, "-o", path, "--force")
    assert path.read_bytes() == written
    path.write_text("dear: reader\n")
    assert "not a recipe" in refused("recipe", artifact, "-o", path, "--force")


def test_a_recipe_s_run(given, tmp_path) -> None:
    text = f"recipe: 1\nmodel: {given[1]}\ndata: {given[3]}\noutput: {tmp_path / 'b'}\n"
    for seed, more in ((1, ()), (2, ("--force",))):
        (tmp_path / "r.yaml").write_text(f"{text}pca: {{num_tokens: 256, seq_len: 64, seed: {seed}}}\n")
        run("run", "--recipe", tmp_path / "r.yaml", *more)
        assert load(tmp_path / "b").settings["seed"] == seed
