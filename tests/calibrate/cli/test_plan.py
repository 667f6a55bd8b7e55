"""`calibrate plan` as a user runs it, on a tiny model folder."""

from __future__ import annotations

import json
import random

import pytest
from cli_runs import refused, run

from kvcal.calibrate.planning import settings

QUICK = ("--prefix", 64, "--windows", 1, "--check-windows", 2, "--continuation", 20)
TEXT_ONLY = ("--tasks", "perplexity")


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """Fewer settings to measure: whole grids take minutes."""
    monkeypatch.setattr(settings, "KEEP", (1 / 64, 1 / 8))
    monkeypatch.setattr(settings, "_READING", settings._READING[1:3])


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    rng = random.Random(0)
    words = [f"{a}{b}{c}{d}" for a in "bdfg" for b in "aei" for c in "lmn" for d in "ou"]
    path = tmp_path_factory.mktemp("text") / "notes.txt"
    path.write_text("\n".join(" ".join(rng.choices(words, k=9)) + "." for _ in range(300)))
    return path


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, tiny_model_folder, text):
    folder = tmp_path_factory.mktemp("artifacts")
    other, folder = folder / "other.txt", folder / "tiny"
    other.write_text(text.read_text())
    options = ("--num-tokens", 1024, "--seq-len", 64, "--reservoir", 400)
    run("pca", "--model", tiny_model_folder, "--data", other, "--output", folder, *options)
    return folder


def test_the_plan_is_written_and_decodes(artifact, text, tmp_path):
    budget = 0.6
    tasks = ("--tasks", "perplexity,passkey", "--episodes", 1)
    body = json.loads(run("plan", artifact, "--data", text, *QUICK, *tasks, "--bytes", budget, "--json").stdout)
    assert body == json.loads((artifact / "plan.json").read_text())
    assert len(body["layers"]) == 2 and {layer["method"] for layer in body["layers"]} <= {"spectral", "full"}
    assert body["predicted"]["bytes"] <= budget
    # A model of random weights answers nothing.
    assert body["full"]["scores"] == body["dropped"] == {"passkey@64": 0} and body["measured"]["scores"] == {}
    arguments = ("--prefix", 64, "--continuation", 20, "--windows", 3, *TEXT_ONLY)
    found = json.loads(run("evaluate", artifact, "--data", text, *arguments, "--method", "plan", "--json").stdout)
    full, planned = found["results"]
    assert planned["method"] == "plan" and planned["bytes_per_step"] < full["bytes_per_step"]


def test_the_same_command_makes_the_same_plan(artifact, text):
    arguments = ("plan", artifact, "--data", text, *QUICK, *TEXT_ONLY, "--method", "loki", "--bytes", 0.9)
    run(*arguments)
    before = (artifact / "plan.json").read_bytes()
    out = run(*arguments).stdout
    assert (artifact / "plan.json").read_bytes() == before
    assert "predicted:" in out and "measured:" in out and max(map(len, out.splitlines())) <= 120


def test_quality_finds_the_fewest_bytes_that_keep_it(artifact, text):
    """Of a perplexity that any settings keep, the cheapest; of one that only dense attention keeps, that."""
    arguments = ("plan", artifact, "--data", text, *QUICK, *TEXT_ONLY, "--method", "clusterkv", "--json")
    easy = json.loads(run(*arguments, "--quality", 0.01).stdout)
    cheapest = {layer: min(point["bytes"] for point in points) for layer, points in easy["offers"].items()}
    assert easy["predicted"]["bytes"] == pytest.approx(sum(cheapest.values()) / len(cheapest))
    strict = json.loads(run(*arguments, "--quality", 0.9).stdout)
    assert strict["measured"]["perplexity_ratio"] <= 1 / 0.9
    assert strict["predicted"]["bytes"] >= easy["predicted"]["bytes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --data"),
        (("--data", "TEXT", "--bytes", 0.5, "--quality", 0.9), "give one of them"),
        (("--data", "TEXT", "--method", "h2o"), "no plans for method 'h2o': choose among spectral, loki, clusterkv"),
        (("--data", "TEXT", "--method", "loki", "--bytes", 0.0001, *QUICK, *TEXT_ONLY), "the cheapest settings read"),
        (("--data", "TEXT", *QUICK, "--tasks", "passkey"), "let perplexity be among --tasks"),
        (("--data", "TEXT", "--bytes", 2), "2.0 is not in the range"),
    ],
)
def test_bad_input_is_one_line_and_leaves_the_plan(artifact, text, arguments, message):
    kept = '{"format": 1, "layers": [], "by": "kept"}'
    (artifact / "plan.json").write_text(kept)
    given = [text if argument == "TEXT" else argument for argument in arguments]
    assert message in refused("plan", artifact, *given)
    assert (artifact / "plan.json").read_text() == kept
