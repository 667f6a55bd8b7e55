"""`calibrate plan` as a user runs it, on a tiny model folder."""

from __future__ import annotations

import json
import random
import shutil

import pytest
from cli_runs import invoke, refused, run

from kvcal.artifacts import KvcalError, Stage, load, save
from kvcal.calibrate import load_model, make_prompts, open_data
from kvcal.calibrate import plan as make_plan
from kvcal.calibrate.planning import divergence, plan, settings
from kvcal.runtime.methods import METHODS, spectral

QUICK = ("--prefix", 64, "--windows", 1, "--check-windows", 2, "--continuation", 20)
TEXT_ONLY = ("--tasks", "perplexity")
LAYERS, HEAD_DIM = 2, 8
"""Of the tiny model."""


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """Fewer settings to measure: whole grids take minutes."""
    monkeypatch.setattr(settings, "KEEP", (1 / 64, 1 / 8))
    monkeypatch.setattr(spectral, "PLANNING_CODES", spectral.PLANNING_CODES[:3])


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    rng = random.Random(0)
    words = [f"{a}{b}{c}{d}" for a in "bdfg" for b in "aei" for c in "lmn" for d in "ou"]
    path = tmp_path_factory.mktemp("text") / "notes.txt"
    path.write_text("\n".join(" ".join(rng.choices(words, k=9)) + "." for _ in range(300)))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_model_folder, text):
    folder = tmp_path_factory.mktemp("artifacts")
    other, folder = folder / "other.txt", folder / "tiny"
    other.write_text(text.read_text())
    options = ("--num-tokens", 1024, "--seq-len", 64, "--reservoir", 400)
    run("pca", "--model", tiny_model_folder, "--data", other, "--output", folder, *options)
    run("cluster", folder, "--metric", "joint", "--clusters", 8)
    return folder


@pytest.fixture
def artifact(made, tmp_path):
    """Without a plan and measurements."""
    return shutil.copytree(made, tmp_path / "artifact")


@pytest.fixture
def work(monkeypatch):
    """Counts what takes long: settings measured in a layer, and settings decoded."""
    counts = {"measured": 0, "decoded": 0}
    measure, decode = plan.measure, divergence.Decoder.decode

    def measured(problem, settings, *arguments):
        counts["measured"] += len(settings)
        return measure(problem, settings, *arguments)

    def decoded(decoder, full, method):
        counts["decoded"] += method != "full"
        return decode(decoder, full, method)

    monkeypatch.setattr(plan, "measure", measured)
    monkeypatch.setattr(divergence.Decoder, "decode", decoded)
    return counts


def planned(artifact, text, *arguments):
    return json.loads(run("plan", artifact, "--data", text, *QUICK, *arguments, "--json").stdout)


def test_the_plan_is_written_and_decodes(artifact, text):
    budget = 0.6
    body = planned(artifact, text, "--tasks", "perplexity,passkey", "--episodes", 1, "--bytes", budget)
    assert body == json.loads((artifact / "plan.json").read_text())
    assert len(body["layers"]) == 2 and {layer["method"] for layer in body["layers"]} <= {"spectral", "full"}
    assert body["predicted"]["bytes"] <= budget and "layers with full attention" in body["bytes_of"]
    # A model of random weights answers nothing.
    assert body["full"]["scores"] == body["dropped"] == {"passkey@64": 0} and body["measured"]["scores"] == {}
    arguments = ("--prefix", 64, "--continuation", 20, "--windows", 3, *TEXT_ONLY)
    found = json.loads(run("evaluate", artifact, "--data", text, *arguments, "--method", "plan", "--json").stdout)
    full, planned_row = found["results"]
    assert planned_row["method"] == "plan" and planned_row["bytes_per_step"] < full["bytes_per_step"]


def test_a_program_gets_the_plan_of_the_command(artifact, tiny_model_folder, text, tmp_path):
    body = planned(artifact, text, *TEXT_ONLY, "--bytes", 0.6)
    (artifact / "plan.json").unlink()
    loaded, found = load_model(tiny_model_folder), load(artifact)
    prompts = make_prompts(
        open_data(text), loaded.tokenizer, prefix=64, continuation=20, windows=3, tasks=["perplexity"]
    )
    arguments = {"budget": 0.6, "windows": 1, "output": tmp_path / "plan.json"}
    made = make_plan(loaded.model, found, prompts, **arguments)
    assert [made[name] for name in ("layers", "predicted", "candidates")] == [
        body[name] for name in ("layers", "predicted", "candidates")
    ]
    assert json.loads((tmp_path / "plan.json").read_text()) == json.loads(json.dumps(made))
    with pytest.raises(KvcalError, match="3 windows, 3 to measure on: a plan needs more"):
        make_plan(loaded.model, found, prompts, windows=3)
    with pytest.raises(KvcalError, match="the cheapest settings of spectral read"):
        make_plan(loaded.model, found, prompts, windows=1, budget=1e-4)


def test_of_the_candidates_the_least_divergent_is_the_plan(artifact, text):
    body = planned(artifact, text, *TEXT_ONLY, "--bytes", 0.6)
    found = body["candidates"]
    assert len(found) > 2 and {"weighted", "uniform"} <= {each["kind"] for each in found}
    assert found[0]["divergence"] == min(each["divergence"] for each in found) > 0
    assert body["predicted"]["bytes"] == found[0]["bytes"]
    assert all(each["bytes"] <= 0.6 for each in found)


def test_the_same_command_makes_the_same_plan(artifact, text):
    arguments = ("plan", artifact, "--data", text, *QUICK, *TEXT_ONLY, "--method", "loki", "--bytes", 0.9)
    run(*arguments)
    before = (artifact / "plan.json").read_bytes()
    (artifact / "plan.measured.json").unlink()
    out = run(*arguments).stdout
    assert (artifact / "plan.json").read_bytes() == before
    assert "predicted:" in out and "measured:" in out and max(map(len, out.splitlines())) <= 120


def test_another_budget_measures_nothing(artifact, text, work):
    arguments = ("plan", artifact, "--data", text, *QUICK, *TEXT_ONLY)
    run(*arguments, "--bytes", 0.6)
    assert work["measured"] == LAYERS * len(settings.grid("spectral", HEAD_DIM))
    measured, decoded = work["measured"], work["decoded"]
    done = run(*arguments, "--bytes", 0.7)
    assert work["measured"] == measured and work["decoded"] <= decoded + 6  # candidates
    assert "plan.measured.json: goes on with what was measured" in done.stderr
    decoded = work["decoded"]
    run(*arguments, "--bytes", 0.6)
    assert work["decoded"] == decoded


def test_a_killed_run_goes_on(artifact, text, work, monkeypatch):
    """Killed after its first layer, it measures only the second, and plans the same."""
    arguments = ("plan", artifact, "--data", text, *QUICK, *TEXT_ONLY, "--bytes", 0.6)
    measured = plan.measure

    def killed(*given):
        if work["measured"]:
            raise KeyboardInterrupt
        return measured(*given)

    monkeypatch.setattr(plan, "measure", killed)
    assert invoke(*arguments).exit_code != 0 and not (artifact / "plan.json").exists()
    assert work["measured"] == len(settings.grid("spectral", HEAD_DIM))
    monkeypatch.setattr(plan, "measure", measured)
    run(*arguments)
    assert work["measured"] == LAYERS * len(settings.grid("spectral", HEAD_DIM))
    resumed = (artifact / "plan.json").read_bytes()
    (artifact / "plan.measured.json").unlink()
    run(*arguments)
    assert (artifact / "plan.json").read_bytes() == resumed


def test_measurements_of_something_else_are_replaced(artifact, text, work):
    kept = artifact / "plan.measured.json"
    kept.write_text(json.dumps({"format": 1, "of": {"artifact": "another"}, "points": {}, "divergence": {}}))
    done = run("plan", artifact, "--data", text, *TEXT_ONLY, *QUICK, "--bytes", 0.6)
    assert "plan.measured.json: was measured on something else, and is measured again" in done.stderr
    assert work["measured"] and json.loads(kept.read_text())["of"]["artifact"] == load(artifact).content_hash


def test_a_budget_below_the_cheapest_settings_is_refused_before_anything_is_measured(artifact, text, work):
    arguments = ("plan", artifact, "--data", text, *QUICK, *TEXT_ONLY, "--bytes", 0.001)
    line = refused(*arguments)
    assert "--bytes 0.001: the cheapest settings of spectral read" in line and "give --bytes 0." in line
    enough = float(line.partition("give --bytes ")[2].split()[0])
    assert work == {"measured": 0, "decoded": 0} and not (artifact / "plan.measured.json").exists()
    body = json.loads(run(*arguments[:-1], enough, "--json").stdout)
    assert body["predicted"]["bytes"] <= enough


def test_quality_finds_the_fewest_bytes_that_keep_it(artifact, text):
    """Of a perplexity that any settings keep, the cheapest; of one that only dense attention keeps, that."""
    arguments = (*TEXT_ONLY, "--method", "clusterkv")
    easy = planned(artifact, text, *arguments, "--quality", 0.01)
    cheapest = {layer: min(point["bytes"] for point in points) for layer, points in easy["offers"].items()}
    assert easy["predicted"]["bytes"] == pytest.approx(sum(cheapest.values()) / len(cheapest))
    strict = planned(artifact, text, *arguments, "--quality", 0.9)
    assert strict["measured"]["perplexity_ratio"] <= 1 / 0.9
    assert strict["predicted"]["bytes"] >= easy["predicted"]["bytes"]


def test_an_artifact_without_a_codebook_says_how_to_make_one(artifact, text, tmp_path):
    found = load(artifact)
    stages = {name: Stage(dict(stage.tensors), stage.settings) for name, stage in found.stages.items()}
    del stages["codebook"]
    bare = tmp_path / "bare"
    save(type(found)(found.model, found.layers, found.data, found.settings, found.versions, stages), bare)
    line = refused("plan", bare, "--data", text, *QUICK)
    assert "no stage 'codebook'" in line
    assert line.endswith(f"make it with `calibrate cluster {bare} --metric joint`, then plan")


def test_every_method_of_a_grid_is_one():
    for method in settings.planned_methods():
        for setting in settings.grid(method, 64):
            METHODS[setting["method"]](**{name: value for name, value in setting.items() if name != "method"}).check()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --data"),
        (("--data", "TEXT", "--bytes", 0.5, "--quality", 0.9), "give one of them"),
        (("--data", "TEXT", "--method", "h2o"), "no plans for method 'h2o': choose among spectral, loki, clusterkv"),
        (("--data", "TEXT", "--method", "loki", "--bytes", 0.0001, *QUICK, *TEXT_ONLY), "cheapest settings of loki"),
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


def test_a_file_of_somebody_elses_is_left(artifact, text):
    (artifact / "plan.measured.json").write_text('{"dear": "reader"}')
    assert "plan.measured.json: is there and not what a plan was made from" in refused("plan", artifact, "--data", text)
