"""`calibrate share` as a user runs it, on a tiny model folder."""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from related_layers import with_trained_weights

from kvcal.artifacts import load, save
from kvcal.calibrate.cli import cli

TEXT = "The quick brown fox jumps over the lazy dog. " * 40
PNG = b"\x89PNG\r\n\x1a\n"


def run(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def refused(*arguments):
    """The one line of an error, after checking that it is one line on stderr and the exit code is 2."""
    result = run(*arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == "" and result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_tokenizer):
    """Four layers, of which 0 and 1 have the same projections and the same input but for what layer 0 adds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
        max_position_embeddings=128,
    )
    found = LlamaForCausalLM(config)
    with torch.no_grad():
        first, second = found.model.layers[:2]
        first.self_attn.o_proj.weight.zero_()
        first.mlp.down_proj.weight.zero_()
        for name in ("k_proj", "v_proj"):
            getattr(second.self_attn, name).weight.copy_(getattr(first.self_attn, name).weight)
    folder = tmp_path_factory.mktemp("models") / "four"
    found.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("artifacts") / "four"
    text = folder.parent / "text.txt"
    text.write_text(TEXT)
    options = ("--num-tokens", 512, "--seq-len", 64, "--reservoir", 200)
    result = run("pca", "--model", model, "--data", text, "--output", folder, *options)
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def artifact(calibrated, tmp_path):
    """A copy that may be changed."""
    return shutil.copytree(calibrated, tmp_path / "artifact")


def shared(artifact, model, *options):
    result = run("share", artifact, "--model", model, *options)
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def test_json_and_the_stage(artifact, model, tmp_path):
    report = json.loads(shared(artifact, model, "--json", "--plot", tmp_path / "share.png").stdout)
    assert report["groups"] == [[0, 1], [2, 3]]
    # 2 KV heads, keys and values of 8 dimensions at 16 bit: 64 bytes per layer
    assert report["bytes_per_token"] == {"before": 4 * 64, "after": 2 * 64}
    assert report["settings"] == load(artifact).stages["cla"].settings
    assert report["settings"]["keys_aligned"] == "pre"
    pairs = {(pair["storing"], pair["reading"]): pair for pair in report["pairs"]}
    assert set(pairs) == {(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)}
    assert pairs[0, 1]["cost_as_is"] < 1e-5 and pairs[0, 1]["key_r2_unaligned"] > 1 - 1e-8
    assert all(pair["cost_as_is"] > 0.1 for places, pair in pairs.items() if places != (0, 1))
    assert (tmp_path / "share.png").read_bytes().startswith(PNG)
    assert "cla" in (artifact / "README.md").read_text()


def test_the_table_names_the_pairs_the_bytes_and_the_bandwidth(artifact, model):
    out = shared(artifact, model, "--pattern", "keep-ends").stdout
    assert all(f"{layer} → {layer + 1}" in out for layer in range(3)) and "0 → 2" not in out
    assert "groups 0,1-2,3 (keep-ends)" in out and "256 → 192 bytes per token" in out
    assert "decode bandwidth does not fall by itself" in out


def test_what_every_pattern_would_store(artifact, model):
    """4 layers of 64 bytes. keep-ends is 0, 1-2, 3 for every size of groups, and the dense ones store as many."""
    report = json.loads(shared(artifact, model, "--json").stdout)
    stored = {"uniform": [2, 2, 1], "keep-ends": [3, 3, 3], "dense-front": [3, 3, 3], "dense-back": [3, 3, 3]}
    assert {
        (of["pattern"], of["group"]): (of["stored_layers"], of["bytes_per_token"]) for of in report["patterns"]
    } == {
        (pattern, group): (count, 64 * count)
        for pattern, counts in stored.items()
        for group, count in zip((2, 3, 4), counts, strict=True)
    }
    assert all(len(of["groups"]) == of["stored_layers"] for of in report["patterns"])
    out = shared(artifact, model).stdout
    assert all(any(pattern in line and "192" in line for line in out.splitlines()) for pattern in list(stored)[1:])


def test_auto_takes_the_layers_that_are_alike(artifact, model):
    report = json.loads(shared(artifact, model, "--pattern", "auto", "--budget-layers", 3, "--json").stdout)
    assert report["groups"] == [[0, 1], [2], [3]] and report["settings"]["pattern"] == "auto"


def test_twice_gives_the_same_bytes(artifact, model):
    hashes = set()
    for _ in range(2):
        shared(artifact, model, "--pattern", "auto")
        hashes.add(load(artifact).content_hash)
    assert len(hashes) == 1


def test_inspect_and_verify_know_the_stage(artifact, model):
    shared(artifact, model)
    assert "cla" in run("inspect", artifact).stdout
    assert run("verify", artifact, "--model", model).exit_code == 0


def test_trained_weights_are_not_thrown_away(artifact, model):
    shared(artifact, model)
    before = save(with_trained_weights(load(artifact)), artifact).content_hash
    assert "has fitted or trained weights: give --uptrain --continue" in refused("share", artifact, "--model", model)
    assert load(artifact).content_hash == before
    shared(artifact, model, "--overwrite")
    assert not any(name.startswith("weights.") for name in load(artifact).stages["cla"].tensors)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--pattern", "0-1"), "layers 2, 3 are in none"),
        (("--pattern", "0-1,2-9"), "layers 0 to 3"),
        (("--pattern", "zigzag"), "unknown pattern 'zigzag'"),
        (("--group", 5), "--group"),
        (("--budget-layers", 0), "--budget-layers"),
        (("--budget-layers", 3), "not 3"),
        (("--pattern", "auto", "--budget-layers", 5), "give 1 to 4"),
        (("--plot", "figure.pdf"), ".png"),
    ],
)
def test_bad_options(calibrated, model, options, message):
    before = load(calibrated).content_hash
    assert message in refused("share", calibrated, "--model", model, *options)
    assert load(calibrated).content_hash == before


def test_the_model_must_be_the_artifacts(calibrated, tiny_model_folder):
    assert "num_hidden_layers 4" in refused("share", calibrated, "--model", tiny_model_folder)
    assert "--model" in refused("share", calibrated)


def test_other_weights_of_the_same_shape(calibrated, model, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = shutil.copytree(model, tmp_path / "model")
    other = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        other.lm_head.weight += 1
    other.save_pretrained(folder)
    assert "other weights" in refused("share", calibrated, "--model", folder)


def test_what_is_not_an_artifact(tmp_path, model):
    assert "does not exist" in refused("share", tmp_path / "nowhere", "--model", model)
