"""`calibrate evaluate --method full,cla,cla+loki` on an artifact with a stage `cla`."""

import json
import random

import pytest
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from kvcal import artifacts
from kvcal.artifacts import Stage
from kvcal.calibrate.cli import cli
from kvcal.runtime.cla import SharingMap, shared

GROUPS = "0-1"
QUICK = ("--prefix", 48, "--continuation", 8, "--windows", 2, "--tasks", "perplexity", "--batch-size", 2, "--json")


def invoke(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "notes.txt"
    path.write_text("\n".join(" ".join(rng.choices(["one", "two", "three", "four"], k=9)) for _ in range(200)))
    return path


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, tiny_model_folder, text):
    """As after uptraining: weights (here the first layer's own) and bases of both layers' keys."""
    folder = tmp_path_factory.mktemp("artifacts") / "tiny"
    options = ("--num-tokens", 1024, "--seq-len", 64, "--reservoir", 40, "--output", folder)
    assert invoke("pca", "--model", tiny_model_folder, "--data", text, *options).exit_code == 0
    found = artifacts.load(folder)
    with shared(AutoModelForCausalLM.from_pretrained(tiny_model_folder), SharingMap.parse(GROUPS), pool="first") as of:
        weights = {f"weights.{name}": parameter.detach().clone() for name, parameter in of.parameters.items()}
    pca = found.stages["pca"].tensors
    bases = {name: pca[name].clone() for name in pca if name.split(".")[1] == "0" and ".key_p" in name}
    stage = Stage({**measured(found), **weights, **bases}, {"groups": GROUPS, "pool": "first"})
    artifacts.save(found.with_stage("cla", stage), folder)
    return folder


def measured(found):
    """What `calibrate share` measures; it does not matter here."""
    from kvcal.calibrate.cla.stage import share

    return dict(share(found).stages["cla"].tensors)


def rows_of(artifact, text, *options):
    result = invoke("evaluate", artifact, "--data", text, *QUICK, *options)
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout)["results"]


def test_projections_that_nobody_has_fitted_are_told(artifact, text, tmp_path, tiny_model_folder):
    quick = ("--data", text, *QUICK, "--method", "cla")
    assert "the mean of their layers'" not in invoke("evaluate", artifact, *quick).stderr
    options = ("--num-tokens", 512, "--seq-len", 64, "--reservoir", 40, "--output", tmp_path / "a")
    assert invoke("pca", "--model", tiny_model_folder, "--data", text, *options).exit_code == 0
    assert invoke("share", tmp_path / "a", "--model", tiny_model_folder).exit_code == 0
    told = invoke("evaluate", tmp_path / "a", *quick).stderr
    assert "its shared projections are the mean of their layers'" in told and "--uptrain --steps 0" in told
    assert "the mean of" not in invoke("evaluate", tmp_path / "a", *quick, "--set", "pool=mean").stderr


def test_cla_and_methods_that_decode_after_it(artifact, text):
    full, cla, loki = rows_of(artifact, text, "--method", "full,cla,cla+loki", "--keep", "1.0")
    assert [row["method"] for row in (full, cla, loki)] == ["full", "cla", "cla+loki"]
    assert full["resident_bytes"] == 2 * cla["resident_bytes"] == 2 * loki["resident_bytes"]
    assert loki["perplexity"] == pytest.approx(cla["perplexity"], rel=1e-4)
    assert cla["perplexity_ratio"] == pytest.approx(cla["perplexity"] / full["perplexity"])
    (_, *others) = rows_of(artifact, text, "--method", "cla", "--set", "uptrained=false", "--set", "pool=mean,first")
    # The stage's weights are the first layer's own.
    assert others[1]["perplexity"] == pytest.approx(cla["perplexity"], rel=1e-6) != others[0]["perplexity"]


def test_loki_after_a_map_that_shares_nothing_reads_the_models_own_bases(artifact, text):
    _, plain = rows_of(artifact, text, "--method", "loki", "--keep", "0.5")
    _, alone = rows_of(artifact, text, "--method", "cla+loki", "--keep", "0.5", "--set", "groups=0/1")
    assert alone["perplexity"] == pytest.approx(plain["perplexity"], rel=1e-6)


def test_what_is_not_there_is_told_in_one_line(artifact, text):
    for options, message in (
        (("--method", "cla", "--set", "groups=4"), "groups '4': give a text"),
        (("--method", "cla+loki", "--set", "uptrained=false"), "calibrate share ARTIFACT"),
        (("--method", "cla+h2o"), "h2o evicts"),
        (("--method", "cla", "--set", "groups=0-2"), "this model has layers 0 to 1"),
    ):
        result = invoke("evaluate", artifact, "--data", text, *QUICK, *options)
        assert result.exit_code == 2, result.output
        (line,) = result.stderr.splitlines()
        assert message in line
