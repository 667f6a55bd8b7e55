"""`calibrate share --uptrain` and `calibrate export` as a user runs them."""

import json
import random
import shutil
import signal

import pytest
import ranks
import torch
from click.testing import CliRunner

from kvcal.artifacts import load
from kvcal.calibrate.cli import cli
from kvcal.runtime.cla import load_cla, sharing_of

TRAIN = ("--steps", 6, "--batch-size", 2, "--block-size", 16, "--lr", "3e-3")
PNG = b"\x89PNG\r\n\x1a\n"


def run(*arguments, code=0):
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def refused(*arguments):
    result = run(*arguments, code=2)
    told = ("reading text", "weights are ")
    lines = [line for line in result.stderr.splitlines() if not line.startswith(told)]
    assert result.stdout == "" and len(lines) == 1 and lines[0].startswith("Error: "), result.stderr
    return lines[0]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "notes.txt"
    path.write_text("\n".join(" ".join(rng.choices(["key", "value", "query", "head"], k=9)) for _ in range(60)))
    return path


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory, tiny_model_folder, text):
    folder = tmp_path_factory.mktemp("artifacts") / "tiny"
    options = ("--num-tokens", 512, "--seq-len", 64, "--reservoir", 100)
    run("pca", "--model", tiny_model_folder, "--data", text, "--output", folder, *options)
    return folder


@pytest.fixture
def artifact(tmp_path, calibrated):
    return shutil.copytree(calibrated, tmp_path / "a")


def uptrain(artifact, model, text, *more, command=run):
    return command("share", artifact, "--model", model, "--uptrain", "--data", text, *TRAIN, *more)


def test_resuming_what_has_ended_says_so_and_trains_nothing(tiny_model_folder, text, artifact):
    uptrain(artifact, tiny_model_folder, text)
    for more in ((), ("--continue",)):
        uptrain(artifact, tiny_model_folder, text, *more)
        before = {path.name: path.read_bytes() for path in artifact.iterdir()}
        again = uptrain(artifact, tiny_model_folder, text, *more, "--resume")
        assert "already uptrained with this model, text and settings: nothing is left to resume" in again.stderr
        assert {path.name: path.read_bytes() for path in artifact.iterdir()} == before


@pytest.mark.parametrize("again", [("--pattern", "0,1"), ("--uptrain", "--steps", 0, "--block-size", 16, "--data")])
def test_the_figure_of_a_training_goes_with_its_weights(tiny_model_folder, text, artifact, again):
    uptrain(artifact, tiny_model_folder, text)
    assert (artifact / "uptraining.png").exists()
    data = [text] if again[-1] == "--data" else []
    run("share", artifact, "--model", tiny_model_folder, "--overwrite", *again, *data)
    assert not (artifact / "uptraining.png").exists()


@pytest.mark.parametrize(("tokens", "refit"), [(128, 2), (10**6, 8), (1, 1)])
def test_keys_are_refit_on_as_many_tokens_as_bases_need(monkeypatch, tiny_model_folder, text, artifact, tokens, refit):
    """In blocks as long as those of the artifact's pass, 8 of 64 tokens, of which there are no more."""
    from kvcal.calibrate.cla import refit as module

    shapes, refit_keys = [], module.refit_keys

    def spy(model, sharing_map, weights, blocks, **more):
        shapes.append(tuple(blocks.ids.shape))
        return refit_keys(model, sharing_map, weights, blocks, **more)

    monkeypatch.setattr(module, "REFIT_TOKENS", tokens)
    monkeypatch.setattr(module, "refit_keys", spy)
    uptrain(artifact, tiny_model_folder, text)
    assert shapes == [(refit, 64)]


def test_training_adds_weights_bases_and_a_figure_and_export_writes_what_loads(
    tmp_path, tiny_model_folder, text, artifact
):
    out = uptrain(artifact, tiny_model_folder, text, "--plot", tmp_path / "loss.png")
    assert "6 steps, shared weights" in out.stdout and "next: calibrate evaluate" in out.stdout
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG)
    assert (artifact / "uptraining.png").read_bytes().startswith(PNG)
    assert not artifact.with_name("a.uptraining").exists()
    stage = load(artifact).stages["cla"]
    assert stage.settings["groups"] == "0-1" and stage.settings["uptraining"]["steps"] == 6
    assert "layers.0.key_post.components" in stage.tensors and "layers.1.key_post.components" not in stage.tensors

    done = stage.settings["uptraining"]
    (line,) = (line for line in run("inspect", artifact).stdout.splitlines() if "uptraining" in line)
    losses = " → ".join(f"{done[part]['loss']:.3f}" for part in ("first_losses", "last_losses"))
    assert "uptraining 6 steps (" in line and f"loss {losses}" in line and "sha256" not in line and "{" not in line

    again = uptrain(artifact, tiny_model_folder, text)
    assert "already uptrained" in again.stderr
    assert "--force" in uptrain(artifact, tiny_model_folder, text, "--seed", 1, command=refused)
    before = load(artifact).content_hash
    uptrain(artifact, tiny_model_folder, text, "--seed", 1, "--overwrite", "--pool", "first")
    assert load(artifact).content_hash != before and load(artifact).stages["cla"].settings["pool"] == "first"

    continued = json.loads(uptrain(artifact, tiny_model_folder, text, "--continue", "--json").stdout)
    more = continued["settings"]["uptraining"]
    assert (more["earlier"]["seed"], more["seed"], more["pool"]) == (1, 0, "first")

    found = json.loads(run("export", artifact, "--model", tiny_model_folder, "--cla", tmp_path / "m", "--json").stdout)
    assert found["groups"] == "0-1" and found["uptrained"]
    loaded = load_cla(tmp_path / "m")
    assert torch.equal(
        loaded.get_parameter("model.layers.0.self_attn.k_proj.weight"),
        load(artifact).stages["cla"].tensors["weights.model.layers.0.self_attn.k_proj.weight"],
    )
    assert str(sharing_of(loaded).map) == "0-1"
    error = refused("export", artifact, "--model", tiny_model_folder, "--cla", tmp_path / "m")
    assert "already exists" in error

    options = ("--num-tokens", 512, "--seq-len", 64, "--reservoir", 100)
    run("pca", "--model", tmp_path / "m", "--data", text, "--output", tmp_path / "of-m", *options)
    keys = [load(tmp_path / "of-m").tensor("pca", layer, "key_post.components") for layer in (0, 1)]
    assert torch.equal(*keys)


def test_no_steps_fit_where_a_training_would_start(tmp_path, tiny_model_folder, text, artifact):
    options = ("--model", tiny_model_folder, "--uptrain", "--data", text, "--block-size", 16)
    out = run("share", artifact, *options, "--steps", 0)
    assert "fitted" in out.stdout and "nothing was trained" in out.stdout and not (artifact / "uptraining.png").exists()
    stage = load(artifact).stages["cla"]
    done = stage.settings["uptraining"]
    assert (stage.settings["pool"], done["steps"], done["data"]["block_size"]) == ("fitted", 0, 16)
    assert {"weights.model.layers.0.self_attn.q_proj.weight", "layers.0.key_pre.mean"} <= stage.tensors.keys()
    assert "uptraining fitted, no steps" in run("inspect", artifact).stdout
    run("verify", artifact, "--model", tiny_model_folder)
    assert "steps: 0" in run("recipe", artifact).stdout
    assert "already uptrained" in run("share", artifact, *options, "--steps", 0).stderr
    found = json.loads(run("export", artifact, "--model", tiny_model_folder, "--cla", tmp_path / "m", "--json").stdout)
    assert not found["uptrained"]
    continued = json.loads(uptrain(artifact, tiny_model_folder, text, "--continue", "--json").stdout)
    assert continued["settings"]["uptraining"]["earlier"] == done


def test_an_interrupted_training_is_refused_before_a_fit(tiny_model_folder, text, artifact, monkeypatch):
    from kvcal.calibrate.cla import start

    (artifact.with_name("a.uptraining")).mkdir()
    (artifact.with_name("a.uptraining") / "state.json").write_text("{}")
    run("share", artifact, "--model", tiny_model_folder)
    monkeypatch.setattr(start, "starting_weights", None)
    assert "add --resume" in uptrain(artifact, tiny_model_folder, text, command=refused)


def test_a_failure_after_the_training_loses_nothing(tmp_path, tiny_model_folder, text, calibrated, monkeypatch):
    from kvcal.artifacts import KvcalError
    from kvcal.calibrate.cla import refit, uptraining

    def fail(*given, **settings):
        raise KvcalError("no space")

    straight, other = (shutil.copytree(calibrated, tmp_path / name) for name in ("straight", "other"))
    uptrain(straight, tiny_model_folder, text)
    with monkeypatch.context() as broken:
        broken.setattr(refit, "refit_keys", fail)
        assert "no space" in uptrain(other, tiny_model_folder, text, command=refused)
    monkeypatch.setattr(uptraining._Run, "_step", fail)  # nothing is trained again
    uptrain(other, tiny_model_folder, text, "--resume")
    assert stage_of(other) == stage_of(straight) and not (tmp_path / "other.uptraining").exists()


def test_json_is_alone_and_holds_the_history(tmp_path, tiny_model_folder, text, artifact):
    found = json.loads(uptrain(artifact, tiny_model_folder, text, "--distill", 0, "--train", "all", "--json").stdout)
    assert len(found["history"]) == 6 and found["settings"]["uptraining"]["train"] == "all"
    assert all(record["loss"] == record["cross_entropy"] for record in found["history"])


def test_the_map_that_is_there_is_trained_unless_another_is_asked_for(tmp_path, tiny_model_folder, text, artifact):
    run("share", artifact, "--model", tiny_model_folder, "--pattern", "0,1")
    assert "nothing to train" in uptrain(artifact, tiny_model_folder, text, command=refused)
    uptrain(artifact, tiny_model_folder, text, "--pattern", "0-1")
    assert load(artifact).stages["cla"].settings["groups"] == "0-1"


def test_auto_again_is_the_map_that_is_there(tmp_path, tiny_model_folder, text, artifact):
    auto = ("--pattern", "auto", "--budget-layers", 1)
    uptrain(artifact, tiny_model_folder, text, *auto)
    before = load(artifact).content_hash
    assert "already uptrained" in uptrain(artifact, tiny_model_folder, text, *auto).stderr
    assert (
        "already uptrained" in uptrain(artifact, tiny_model_folder, text, "--pattern", "auto").stderr
    )  # pairs: 1, too
    assert "--force" in uptrain(artifact, tiny_model_folder, text, *auto[:3], 2, command=refused)
    assert load(artifact).content_hash == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--data", "x.txt"), "--data is for training: give --uptrain"),
        (("--lr", "1e-3"), "--lr is for training"),
        (("--continue",), "--continue is for training"),
        (("--uptrain", "--data", "TEXT", "--steps", 3, "--continue"), "nothing was trained yet"),
        (("--uptrain",), "give --data and --steps"),
        (("--uptrain", "--steps", 3), "give --data and --steps"),
        (("--uptrain", "--data", "no/such.txt", "--steps", 3), "such.txt"),
        (("--uptrain", "--data", "TEXT", "--steps", -1), "--steps"),
        (("--uptrain", "--data", "TEXT", "--steps", 0, "--pool", "mean"), "0 steps"),
        (("--uptrain", "--data", "TEXT", "--steps", 3, "--lr", -1), "learning rate"),
        (("--uptrain", "--data", "TEXT", "--steps", 3, "--lr", "fast"), "--lr"),
        (("--uptrain", "--data", "TEXT", "--steps", 3, "--warmup", 3), "fewer than the 3"),
        (("--uptrain", "--data", "TEXT", "--steps", 3, "--block-size", 4096), "context of 128"),
        (("--uptrain", "--data", "TEXT", "--steps", 3, "--train", "none"), "--train"),
        (
            ("--uptrain", "--data", "TEXT", "--steps", 3, "--block-size", 16, "--dtype", "float16"),
            "bfloat16 or float32",
        ),
        (("--uptrain", "--data", "TEXT", "--steps", 3, "--pattern", "0"), "layers 1"),
    ],
)
def test_bad_input_is_one_line(tiny_model_folder, text, artifact, options, message):
    given = [text if option == "TEXT" else option for option in options]
    before = load(artifact).content_hash
    assert message in refused("share", artifact, "--model", tiny_model_folder, *given)
    assert load(artifact).content_hash == before or "cla" in load(artifact).stages


def test_other_models_and_artifacts_are_refused(tmp_path, tiny_model_folder, text, artifact):
    assert "no stage cla" in refused("export", artifact, "--model", tiny_model_folder, "--cla", tmp_path / "m")
    assert "fitted" in uptrain(artifact, "demo", text, command=refused)
    run("share", artifact, "--model", tiny_model_folder)
    assert "fitted" in refused("export", artifact, "--model", "demo", "--cla", tmp_path / "m")
    assert not (tmp_path / "m").exists()


SLOWED = """
import time
from kvcal.calibrate.cla.optimizer import Optimizer
step = Optimizer.step
def slow(self):
    print("step", flush=True)
    time.sleep(0.05)
    return step(self)
Optimizer.step = slow
"""


def slowed(folder, arguments, steps, send):
    """Run with slow steps, in a process of its own, and send a signal in one of them; (exit code, stderr)."""
    job = ranks.start(folder, list(arguments), 1, SLOWED)
    job.until(lambda: job.out(0).count("step\n") >= steps)
    job.kill(0, send)
    (code,) = job.wait(120)
    return code, "\n".join(job.err)


def stage_of(folder):
    (path,) = folder.glob("cla.*.safetensors")
    return path.name, path.read_bytes()


def test_killed_and_interrupted_it_resumes_to_the_same_bytes(tmp_path, tiny_model_folder, text, calibrated):
    straight, other = (shutil.copytree(calibrated, tmp_path / name) for name in ("straight", "other"))
    uptrain(straight, tiny_model_folder, text)
    arguments = ("share", other, "--model", tiny_model_folder, "--uptrain", "--data", text, *TRAIN)
    arguments += ("--checkpoint-every", 1)
    code, _ = slowed(tmp_path / "killed", arguments, 3, signal.SIGKILL)
    assert code == -signal.SIGKILL and (tmp_path / "other.uptraining" / "state.json").exists()
    assert "add --resume" in refused(*arguments)
    code, err = slowed(tmp_path / "stopped", (*arguments, "--resume"), 2, signal.SIGINT)
    assert code == 130 and "nothing lost: add --resume" in err and "Traceback" not in err
    run(*arguments, "--resume")
    assert stage_of(other) == stage_of(straight)
    assert not (tmp_path / "other.uptraining").exists()
