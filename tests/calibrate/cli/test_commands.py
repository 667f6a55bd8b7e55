"""Every command as a user runs it, on a tiny model folder and own text."""

import json
import random

import pytest
import torch
from click.testing import CliRunner

from kvcal.artifacts import QUANTITIES, load
from kvcal.calibrate.cli import cli
from kvcal.calibrate.cli.group import COMMANDS
from kvcal.calibrate.rank import rank_at

PNG = b"\x89PNG\r\n\x1a\n"


def run(*arguments, code=0):
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    rng = random.Random(0)
    words = ["key", "value", "query", "head", "layer", "cache", "token", "rank"]
    path = tmp_path_factory.mktemp("text") / "notes.txt"
    path.write_text("\n".join(" ".join(rng.choices(words, k=9)) + "." for _ in range(200)))
    return path


def pca(model, text, output, *more):
    options = ("--num-tokens", 1024, "--seq-len", 64, "--reservoir", 400)
    return run("pca", "--model", model, "--data", text, "--output", output, *options, *more)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory, tiny_model_folder, text):
    """A calibrated and clustered artifact; do not change it."""
    folder = tmp_path_factory.mktemp("artifacts") / "tiny"
    pca(tiny_model_folder, text, folder)
    run("cluster", folder, "--clusters", 5)
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command):
    assert f"Example:\n    calibrate {command}" in run(command, "--help").stdout


def test_pca_prints_json_and_nothing_else(tmp_path, tiny_model_folder, text):
    found = json.loads(pca(tiny_model_folder, text, tmp_path / "a", "--json").stdout)
    assert (found["layers"], found["kv_heads"], found["query_heads"], found["head_dim"]) == (2, 2, 4, 8)
    assert found["data"]["tokens_counted"] == 1024 - 16  # sixteen blocks, each with one BOS
    assert set(found["stages"]) == {"moments", "pca", "score", "reservoir", "codebook"}
    assert found["content_hash"] == load(tmp_path / "a").content_hash


@pytest.mark.parametrize(("num_tokens", "blocks"), [(1000, [128] * 8), (100, [100]), (131072, None)])
def test_blocks_without_a_length(tmp_path, tiny_model_folder, text, num_tokens, blocks):
    """As long as the model's context of 128 tokens, as all tokens asked for, as the whole text."""
    if blocks is None:
        text = tmp_path / "short.txt"
        text.write_text("x" * 50)
    run("pca", "--model", tiny_model_folder, "--data", text, "--output", tmp_path / "o", "--num-tokens", num_tokens)
    data = load(tmp_path / "o").data
    assert [data["seq_len"]] * data["blocks"] == (blocks or [51])  # with BOS


def test_the_default_folder_is_named_after_model_and_data(tmp_path, monkeypatch, tiny_model_folder, text):
    monkeypatch.chdir(tmp_path)
    run("pca", "--model", tiny_model_folder, "--data", text, "--num-tokens", 128, "--seq-len", 64)
    assert load(tmp_path / "tiny-notes.txt").data["blocks"] == 2


def test_analyze_rank_json_is_the_documented_shape(calibrated):
    report = json.loads(run("analyze-rank", calibrated, "--variance", 0.8, "--json").stdout)
    assert report["variance"] == 0.8 and [entry["layer"] for entry in report["layers"]] == [0, 1]
    artifact = load(calibrated)
    for quantity in QUANTITIES:
        for suffix in ("", "_uncentred"):
            ranks = []
            for entry in report["layers"]:
                spectrum = artifact.tensor("pca", entry["layer"], f"{quantity}.eigenvalues{suffix}")
                assert entry[quantity + suffix] == rank_at(spectrum, 0.8).tolist()
                ranks += entry[quantity + suffix]
            assert report["model"][quantity + suffix] == pytest.approx(sum(ranks) / len(ranks))


def test_analyze_rank_can_do_the_pass_first(tmp_path, tiny_model_folder, text):
    options = ("--output", tmp_path / "a", "--num-tokens", 256, "--seq-len", 64, "--json")
    report = json.loads(run("analyze-rank", "--model", tiny_model_folder, "--data", text, *options).stdout)
    assert report == json.loads(run("analyze-rank", tmp_path / "a", "--json").stdout)


def test_figures_are_written(calibrated, tmp_path):
    run("analyze-rank", calibrated, "--plot", tmp_path / "rank.png")
    assert (tmp_path / "rank.png").read_bytes().startswith(PNG)
    assert (calibrated / "rank.png").read_bytes().startswith(PNG)


def test_cluster_json(tmp_path, tiny_model_folder, text):
    pca(tiny_model_folder, text, tmp_path / "a")
    report = json.loads(run("cluster", tmp_path / "a", "--clusters", 7, "--plot", tmp_path / "c.png", "--json").stdout)
    assert report["settings"] == {"clusters": 7, "metric": "cosine", "iterations": 20, "seed": 0}
    sizes = load(tmp_path / "a").tensor("clusters", 0, "sizes")
    assert sizes.shape == (2, 7) and sizes.sum(-1).tolist() == [400, 400]
    for entry in report["layers"]:
        counts = [point["clusters"] for point in entry["clusterability"]]
        deltas = [point["delta"] for point in entry["clusterability"]]
        assert counts[0] == 1 and counts[-1] == 400 and deltas == sorted(deltas, reverse=True)
        assert set(entry["warm_start"]) == {"calibrated", "plusplus", "random"}
    assert (tmp_path / "c.png").read_bytes().startswith(PNG)


def test_the_codebook_that_pca_makes_can_be_made_anew(tmp_path, tiny_model_folder, text):
    pca(tiny_model_folder, text, tmp_path / "a")
    made = load(tmp_path / "a").stages["codebook"]
    assert made.settings == {"codewords": 400 // 8, "iterations": 20, "seed": 0}
    again = run("cluster", tmp_path / "a", "--metric", "joint", "--json")
    assert json.loads(again.stdout)["settings"] == made.settings
    anew = load(tmp_path / "a").stages["codebook"].tensors
    assert all(torch.equal(anew[name], tensor) for name, tensor in made.tensors.items())
    out = run("cluster", tmp_path / "a", "--metric", "joint", "--clusters", 7, "--plot", tmp_path / "c.png").stdout
    assert "7 codewords per KV head" in out and (tmp_path / "c.png").read_bytes().startswith(PNG)
    artifact = load(tmp_path / "a")
    assert artifact.tensor("codebook", 1, "key").shape == (2, 7, 8)
    assert artifact.tensor("codebook", 1, "sizes").sum(1).tolist() == [400, 400]
    run("verify", tmp_path / "a")
    run("cluster", tmp_path / "a", "--metric", "joint", "--tokens-per-cluster", 40)
    assert load(tmp_path / "a").stages["codebook"].settings["codewords"] == 10


def test_the_report_of_a_codebook_compares_seen_and_unseen_text(tmp_path, tiny_model_folder, text):
    pca(tiny_model_folder, text, tmp_path / "a")
    report = json.loads(run("cluster", tmp_path / "a", "--metric", "joint", "--json").stdout)
    for layer in report["layers"]:
        assert [entry["codewords"] for entry in layer["carry"]] == [16], "64 of 200 tokens would be too few"
        for entry in layer["carry"]:
            for of in ("key", "value"):
                assert 0 < entry[f"{of}_fitted"] <= entry[f"{of}_unseen"], "k-means fits what it has seen"


def test_tokens_per_cluster_counts_sampled_tokens(tmp_path, tiny_model_folder, text):
    pca(tiny_model_folder, text, tmp_path / "a")
    run("cluster", tmp_path / "a", "--tokens-per-cluster", 100, "--metric", "l2")
    assert load(tmp_path / "a").tensor("clusters", 1, "centroids").shape == (2, 4, 8)


def test_inspect_and_verify(calibrated, tiny_model_folder):
    assert "2 layers · 2 KV heads · 4 query heads · head dim 8" in run("inspect", calibrated).stdout
    assert json.loads(run("inspect", calibrated, "--json").stdout)["settings"]["seed"] == 0
    found = json.loads(run("verify", calibrated, "--model", tiny_model_folder, "--json").stdout)
    assert found["valid"] and found["model_checked"] and found["content_hash"] == load(calibrated).content_hash


def test_verify_takes_the_model_in_the_dtype_of_the_run(tmp_path, tiny_model_folder, text):
    """The tiny model is stored in float32: as bfloat16 its weights are rounded, and so are others."""
    pca(tiny_model_folder, text, tmp_path / "a", "--dtype", "bfloat16")
    run("verify", tmp_path / "a", "--model", tiny_model_folder)


def test_diff_of_an_artifact_with_itself_and_with_another(calibrated, tmp_path, tiny_model_folder, text):
    same = json.loads(run("diff", calibrated, calibrated, "--json").stdout)
    assert same["same_tensors"] and same["differs"] == []
    assert all(overlap == pytest.approx(1) for entry in same["layers"] for overlap in entry["key_post"]["overlap"])
    pca(tiny_model_folder, text, tmp_path / "other", "--uncentred", "--seed", 5)
    other = json.loads(run("diff", calibrated, tmp_path / "other", "--json").stdout)
    changed = {entry["field"]: (entry["first"], entry["second"]) for entry in other["differs"]}
    assert changed == {"settings.seed": (0, 5), "settings.centred": (True, False)}
    assert not other["same_tensors"]
    run("diff", calibrated, tmp_path / "other")


def test_models_and_datasets_list_the_aliases():
    models = json.loads(run("models", "--json").stdout)
    assert {"mistral-7b", "llama-3.1-8b", "qwen3-8b", "demo"} <= set(models)
    assert "wikitext-2-raw-v1" in run("datasets").stdout


def test_the_card_says_what_the_artifact_is(calibrated):
    card = (calibrated / "README.md").read_text()
    artifact = load(calibrated)
    for fact in (artifact.model.weights_sha256, artifact.data["content_sha256"], "1e-5", "clusters"):
        assert fact in card
