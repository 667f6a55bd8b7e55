"""`calibrate xcla` as a user runs it, on a tiny model folder."""

import dataclasses
import json
import shutil

import pytest
from cli_runs import refused, run

from kvcal.artifacts import load, save

TEXT = "The quick brown fox jumps over the lazy dog. " * 40


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory, tiny_model_folder):
    folder = tmp_path_factory.mktemp("artifacts") / "tiny"
    text = folder.parent / "text.txt"
    text.write_text(TEXT)
    options = ("--num-tokens", 512, "--seq-len", 64, "--reservoir", 200)
    result = run("pca", "--model", tiny_model_folder, "--data", text, "--output", folder, *options)
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def artifact(calibrated, tmp_path):
    return shutil.copytree(calibrated, tmp_path / "a")


def test_the_stage_is_added_and_told(artifact, tiny_model_folder):
    result = run("xcla", artifact, "--model", tiny_model_folder, "--group", 2, "--memory", 0.5, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    found = load(artifact)
    assert report["settings"] == dict(found.stages["xcla"].settings) and report["memory"] <= 0.5
    assert len(report["layers"]) == len(found.layers)
    again = run("xcla", artifact, "--model", tiny_model_folder, "--memory", 0.5)
    assert again.exit_code == 0 and "next: calibrate evaluate" in again.stdout
    size = report["bytes_per_token"]["before"]
    assert f"{size} → " in again.stdout and "a step reads" in again.stdout


def test_it_is_evaluated_and_verified(artifact, tiny_model_folder, tmp_path):
    assert run("xcla", artifact, "--model", tiny_model_folder, "--memory", 0.5).exit_code == 0
    assert run("verify", artifact).exit_code == 0
    text = tmp_path / "other.txt"
    text.write_text(TEXT[::-1])
    shape = ("--prefix", 32, "--continuation", 4, "--windows", 2, "--tasks", "perplexity")
    options = ("--model", tiny_model_folder, "--data", text, *shape, "--output", tmp_path / "r.json")
    result = run("evaluate", artifact, "--method", "xcla", *options)
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "r.json").read_text())["results"]
    assert [row["method"] for row in rows] == ["full", "xcla"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--memory", 0.001), "memory 0.001: the least that codes take here is"),
        (("--memory", 0.9), "0.9 is not in the range"),
        (("--group", 0), "0 is not in the range"),
    ],
)
def test_what_cannot_be_is_one_line(artifact, tiny_model_folder, options, told):
    before = (artifact / "manifest.json").read_bytes()
    line = refused("xcla", artifact, "--model", tiny_model_folder, *options)
    assert told in line
    assert (artifact / "manifest.json").read_bytes() == before


def test_an_artifact_without_a_sample_is_refused(artifact, tiny_model_folder):
    found = load(artifact)
    without = {name: stage for name, stage in found.stages.items() if name not in ("reservoir", "codebook")}

    folder = save(dataclasses.replace(found, stages=without), artifact.parent / "b").folder
    line = refused("xcla", folder, "--model", tiny_model_folder)
    assert "no stage 'reservoir'" in line and line.rstrip().endswith("make it with `calibrate pca`")
