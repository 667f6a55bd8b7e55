"""The slim form of an artifact decodes as the full one; what needs the sample says in one line that it is slim."""

import json
import shutil

import pytest
import torch
from cli_runs import refused, run
from compressed import SMALL, artifact, greedy, model, padded, small
from huggingface_hub import ModelCard

from kvcal.artifacts import ArtifactError, load, save
from kvcal.calibrate.cla.rotation import rotation_of
from kvcal.calibrate.slim import save_slim
from kvcal.runtime import compress
from kvcal.runtime.cla import load_cla

TEXT = "The quick brown fox jumps over the lazy dog. " * 40
PLAN = {"format": 1, "layers": [{"method": "spectral", "keep": 0.5, "rank": 0.5}] * 2}


@pytest.fixture(scope="module")
def full(tmp_path_factory, tiny_model_folder):
    """All stages, calibrated by commands; do not change it."""
    folder = tmp_path_factory.mktemp("artifacts") / "full"
    text = folder.parent / "text.txt"
    text.write_text(TEXT)
    options = ("--num-tokens", 512, "--seq-len", 64, "--reservoir", 200)
    run("pca", "--model", tiny_model_folder, "--data", text, "--output", folder, *options)
    run("cluster", folder, "--clusters", 4)
    run("xcla", folder, "--model", tiny_model_folder, "--group", 2, "--memory", 0.5)
    run("share", folder, "--model", tiny_model_folder)
    (folder / "plan.json").write_text(json.dumps(PLAN))
    return folder


@pytest.fixture(scope="module")
def made(full):
    """Its slim form; do not change it."""
    run("slim", full, full.parent / "slim")
    return full.parent / "slim"


@pytest.mark.parametrize("form", SMALL)
def test_every_method_decodes_as_with_the_full_one(tmp_path, form):
    saved = save(artifact(), tmp_path / "full")
    slimmed = save_slim(saved, tmp_path / "slim")
    assert slimmed.left_out == ("moments", "reservoir")
    outputs = []
    for each in (saved, slimmed):
        with compress(model(), each, **small(form)):
            outputs.append(greedy(model(), padded(9, 40))[:2])
    assert all(torch.equal(*pair) for pair in zip(*outputs, strict=True))


def test_the_plan_goes_with_it_and_the_card_says_what_is_missing(full, made):
    assert json.loads((made / "plan.json").read_text()) == PLAN
    assert {path.name.split(".")[0] for path in made.glob("*.safetensors")} == {
        *("pca", "score", "codebook", "clusters", "xcla", "cla")
    }
    card = (made / "README.md").read_text()
    assert load(full).content_hash in card and "moments and reservoir" in card and "**Slim**" in card
    assert ModelCard(card).data.library_name == "kvcal"
    assert "**Slim**" not in (full / "README.md").read_text()


def test_what_verify_says_of_it(full, made, tiny_model_folder):
    lines = run("verify", made, "--model", tiny_model_folder).stdout.splitlines()
    content = load(full).content_hash
    assert f"slim, without moments and reservoir: its stage files are those of content {content}" in lines
    (left,) = [line for line in lines if line.startswith("not checked")]
    both = " (moments and reservoir)"
    for named in ("pca (moments)", "score (moments)", "clusters (reservoir)", f"codebook{both}", f"xcla{both}"):
        assert named in left
    found = json.loads(run("verify", made, "--json").stdout)
    assert found["valid"] and found["slim_of"] == content and found["not_checked_against"]["clusters"] == ["reservoir"]
    whole = run("verify", full).stdout
    assert "slim" not in whole.replace(str(full), "") and "not checked" not in whole
    assert json.loads(run("verify", full, "--json").stdout)["not_checked_against"] == {}


def test_commands_that_need_no_sample_work(full, made, tiny_model_folder, tmp_path):
    assert "moments and reservoir left out" in run("inspect", made).stdout
    assert json.loads(run("inspect", made, "--json").stdout)["left_out"] == ["moments", "reservoir"]
    ranks = [json.loads(run("analyze-rank", each, "--json").stdout)["layers"] for each in (full, made)]
    assert ranks[0] == ranks[1]
    lines = run("diff", full, made).stdout.splitlines()
    assert lines == ["only in FIRST: moments, reservoir", "the tensor files of all other stages are identical"]
    recipes = [run("recipe", each).stdout for each in (full, made)]
    bodies = [[line for line in text.splitlines() if not line.startswith("#")] for text in recipes]
    differing = [pair for pair in zip(*bodies, strict=True) if pair[0] != pair[1]]
    assert differing == [("output: full", "output: slim")]
    assert f"# It is slim: this makes the full artifact, content {load(full).content_hash}." in recipes[1]
    text = tmp_path / "other.txt"
    text.write_text(TEXT[::-1])
    shape = ("--prefix", 32, "--continuation", 4, "--windows", 2, "--tasks", "perplexity")
    asked = ("--model", tiny_model_folder, "--data", text, *shape, "--method", "plan,loki,clusterkv,xcla,cla")
    rows = []
    for each in (full, made):
        output = tmp_path / f"{each.name}.json"
        run("evaluate", each, *asked, "--output", output)
        rows.append([row["perplexity"] for row in json.loads(output.read_text())["results"]])
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    "command",
    [
        ("cluster",),
        ("cluster", "--metric", "joint"),
        ("xcla", "--model", "MODEL"),
        ("share", "--model", "MODEL", "--overwrite"),
    ],
    ids=" ".join,
)
def test_commands_that_need_it_say_where_it_is(full, made, tiny_model_folder, command):
    name, *options = (tiny_model_folder if word == "MODEL" else word for word in command)
    before = {path.name: path.read_bytes() for path in made.iterdir()}
    line = refused(name, made, *options)
    assert f"{made}: no stage 'reservoir'" in line
    content = load(full).content_hash[:12]
    assert f"it is slim: use the full artifact, content {content}…, or make it with `calibrate pca` anew" in line
    assert {path.name: path.read_bytes() for path in made.iterdir()} == before


def test_a_rotation_at_its_positions_is_not_to_be_had(made):
    with pytest.raises(ArtifactError, match="no stage 'reservoir'"):
        rotation_of(load(made), model())


def test_the_pass_does_not_take_it_for_its_own(full, made, tiny_model_folder):
    options = ("--num-tokens", 512, "--seq-len", 64, "--reservoir", 200)
    asked = ("--model", tiny_model_folder, "--data", full.parent / "text.txt", "--output", made, *options)
    assert f"{made}: holds a slim artifact" in refused("pca", *asked)


def test_uptraining_needs_no_sample(made, tiny_model_folder, tmp_path):
    """The stage that it makes is told apart from the full one's."""
    folder = shutil.copytree(made, tmp_path / "trained")
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    asked = ("--model", tiny_model_folder, "--uptrain", "--data", text, "--steps", 1, "--block-size", 16)
    run("share", folder, *asked)
    assert "but for cla, made afterwards" in run("verify", folder).stdout
    run("export", folder, "--model", tiny_model_folder, "--cla", tmp_path / "model")
    load_cla(tmp_path / "model")


def test_slim_again_is_the_same(made, tmp_path):
    result = run("slim", made, tmp_path / "again")
    assert "the same: it has nothing that decoding does not need" in result.stdout
    for path in made.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_where_it_cannot_be_written(full, made, tmp_path):
    assert f"{made}: already exists: choose another name" in refused("slim", full, made)
    assert f"{full}: already exists" in refused("slim", full, full)
    (tmp_path / "file").write_text("mine")
    assert "file" in refused("slim", full, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    assert "not an artifact" in refused("slim", tmp_path, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_plan_that_is_none_is_refused(full, tmp_path):
    folder = shutil.copytree(full, tmp_path / "full")
    (folder / "plan.json").write_text("{")
    assert "plan.json: cannot be read" in refused("slim", folder, tmp_path / "slim")
    assert not (tmp_path / "slim").exists()


def test_the_json_is_a_summary_of_what_was_written(full, tmp_path):
    found = json.loads(run("slim", full, tmp_path / "slim", "--json").stdout)
    assert found["content_hash"] == load(tmp_path / "slim").content_hash
    assert found["slim_of"]["content_hash"] == load(full).content_hash
