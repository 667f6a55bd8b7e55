"""Layers with a sliding window: measured and marked, left out of means, of the reservoir and of the clusters."""

import json
from dataclasses import replace

import numpy as np
import pytest
import samples
import torch
from architectures import ARCHITECTURES, build
from click.testing import CliRunner

from kvcal.artifacts import ArtifactError, KvcalError, load, save
from kvcal.artifacts.schema import version_of
from kvcal.calibrate.blocks import TokenBlocks
from kvcal.calibrate.card import card_files
from kvcal.calibrate.cla import share
from kvcal.calibrate.cli import cli
from kvcal.calibrate.cluster_stage import cluster
from kvcal.calibrate.one_pass import calibrate
from kvcal.calibrate.rank import rank_report
from kvcal.calibrate.statistics import StatisticsFitter
from kvcal.calibrate.verification import verify
from kvcal.runtime import compress

FULL = [1, 3]
ROWS = {"key_post", "query_post", "value"}
IDS = torch.randint(3, 96, (7, 21), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
COUNTED = torch.ones(7, 21, dtype=torch.bool)
COUNTED[:, 0] = False


def blocks(count=7):
    """Blocks of 21 tokens, of which the first is not counted."""
    return TokenBlocks(IDS[:count], COUNTED[:count], torch.ones_like(COUNTED[:count]), {"id": "random"})


def recorded(model):
    """Per layer and quantity [heads, counted tokens, D], of hooks on the model's own projections."""
    with torch.no_grad():
        layers = ARCHITECTURES["gemma3"].oracle(model, lambda: model(input_ids=IDS.long(), use_cache=False))
    return [{name: rows.transpose(0, 1)[:, COUNTED].double() for name, rows in layer.items()} for layer in layers]


@pytest.fixture(scope="module")
def gemma():
    """Windows of 8 in layers 0 and 2, whose values lie on a line: their rank is 1, whatever the text."""
    types = ["sliding_attention", "full_attention"] * 2
    model = build("gemma3", num_hidden_layers=4, layer_types=types)
    with torch.no_grad():
        for layer in (0, 2):
            weight = model.model.layers[layer].self_attn.v_proj.weight
            weight.copy_(torch.randn(len(weight), 1) * weight[:1])
    return model


@pytest.fixture(scope="module")
def calibrated(gemma):
    return calibrate(gemma, blocks(), reservoir=120)


@pytest.fixture(scope="module")
def folder(calibrated, tmp_path_factory):
    made = share(cluster(calibrated, clusters=4))
    return save(made, tmp_path_factory.mktemp("windows") / "a", card_files(made)).folder


def version(folder):
    return json.loads((folder / "manifest.json").read_text())["schema_version"]


def rank_by_hand(rows):
    """Smallest r with 90 % of the variance of rows [n, D]."""
    spectrum = np.sort(np.linalg.eigvalsh(np.cov(rows.numpy().T)))[::-1]
    return 1 + int((np.cumsum(spectrum) < 0.9 * spectrum.sum()).sum())


def test_means_are_over_layers_with_full_attention(gemma, calibrated):
    report = rank_report(calibrated)
    seen = recorded(gemma)
    ranks = [{name: [rank_by_hand(head) for head in rows] for name, rows in layer.items()} for layer in seen]
    assert [entry["window"] for entry in report["layers"]] == [8, None, 8, None] and report["averaged"] == FULL
    assert ranks[0]["value"] == ranks[2]["value"] == [1, 1] and min(ranks[1]["value"]) > 5
    for name in ("key_pre", "key_post", "query_post", "value"):
        if not name.startswith("query"):  # whose heads are pooled by group
            assert [entry[name] for entry in report["layers"]] == [layer[name] for layer in ranks]
            assert report["model"][name] == np.mean([ranks[layer][name] for layer in FULL])
        assert report["model"][name] == np.mean([report["layers"][layer][name] for layer in FULL])
        shown = [report["layers"][layer]["participation"][name] for layer in FULL]
        assert report["participation"][name] == pytest.approx(np.mean(shown))


def test_layers_are_marked_wherever_they_are_listed(folder, gemma, tmp_path):
    other = save(calibrate(gemma, blocks(3), reservoir=30), tmp_path / "b").folder
    shown, as_json, inspected, compared = (
        CliRunner().invoke(cli, words.split()).stdout
        for words in (
            f"analyze-rank {folder}",
            f"analyze-rank {folder} --json",
            f"inspect {folder}",
            f"diff {folder} {other}",
        )
    )
    cells = [line.split("│")[1].split()[0] for line in shown.splitlines() if line.startswith("│")]
    assert cells == ["0*", "1", "2*", "3", "mean", "participation"]
    assert "means over the 2 of 4 layers with full attention" in shown
    assert json.loads(as_json)["averaged"] == FULL
    assert "layers 0, 2: a window each" in inspected
    assert "│ 0* key_pre " in compared and "│ 1 key_pre " in compared and "* sliding window" in compared
    card = (folder / "README.md").read_text()
    assert "2 layers with full attention, 2 with a sliding window" in card
    assert "means over the 2 of 4 layers with full attention" in card


def test_reservoir_and_clusters_hold_layers_with_full_attention_alone(folder, gemma):
    found = load(folder)
    verify(found)
    held = {f"layers.{layer}.{name}" for layer in FULL for name in ROWS}
    assert set(found.stages["reservoir"].tensors) == {"token", "position", *held}
    assert {name.split(".")[1] for name in found.stages["clusters"].tensors} == {"1", "3"}
    assert {name.split(".")[1] for name in found.stages["pca"].tensors} == {"0", "1", "2", "3"}
    assert {name.split(".")[1] for name in found.stages["codebook"].tensors} == {"1", "3"}
    assert version(folder) == 4
    without = {name: stage for name, stage in found.stages.items() if name != "codebook"}
    assert version_of({name: stage.tensors for name, stage in without.items()}, found.layers) == 3
    with pytest.raises(ArtifactError, match="stage reservoir has nothing of layer 2, which has a sliding window"):
        found.tensor("reservoir", 2, "value")
    seen = recorded(gemma)
    counted = COUNTED.flatten().nonzero().flatten()
    at = torch.searchsorted(counted, found.stages["reservoir"].tensors["token"])
    for layer in FULL:
        rows = found.tensor("reservoir", layer, "key_post").double()
        torch.testing.assert_close(rows, seen[layer]["key_post"][:, at], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "loki", "choice": "sampled", "keep": 1.0, "select": "head", "basis": "pca"},
        {"method": "clusterkv", "keep": 1.0, "tokens_per_cluster": 4, "window": 4, "sinks": 1},
        {"method": "spectral", "keep": 1.0},
    ],
    ids=lambda settings: settings["method"],
)
def test_methods_need_nothing_of_them(folder, gemma, settings):
    ids = IDS[:1].long()
    asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    plain = gemma.generate(**asked)
    with compress(gemma, load(folder), **settings):
        assert torch.equal(gemma.generate(**asked), plain)


def test_merged_and_restored_statistics(gemma):
    from kvcal.calibrate.capture import capture

    tokens = torch.arange(IDS.numel()).view_as(IDS)

    def fitter(rows):
        found = StatisticsFitter(reservoir=30)
        with torch.no_grad(), capture(gemma, lambda seen: found.update(seen, "unrotate")):
            for row in rows:
                found.begin_batch(tokens[row : row + 1], COUNTED[row : row + 1])
                gemma(input_ids=IDS[row : row + 1].long(), use_cache=False)
        return found

    merged, other, whole = StatisticsFitter(reservoir=30), fitter([1, 2]), fitter(range(4))
    for part in (fitter([0, 3]), other):
        merged.merge(StatisticsFitter.from_state(30, 0, *part.state()))
    expected, found = whole.finalize()["reservoir"], merged.finalize()["reservoir"]
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_artifacts_of_before(tmp_path):
    """They hold all layers, in version 1; new clusters are of layers with full attention."""
    made = samples.artifact(tokens=60)
    made = replace(made, layers=(replace(made.layers[0], window=8), made.layers[1]))
    save(made, tmp_path / "a")
    assert version(tmp_path / "a") == 1
    found = load(tmp_path / "a")
    verify(found)
    assert found.tensor("reservoir", 0, "value").shape == (2, 60, 3)
    save(cluster(found, clusters=3), tmp_path / "a")
    clustered = load(tmp_path / "a")
    verify(clustered)
    assert version(tmp_path / "a") == 3 and [layer.index for layer in clustered.layers_in("clusters")] == [1]
    whole = save(made.with_stage("clusters", samples.clusters(tokens=60)), tmp_path / "b")
    assert version(tmp_path / "b") == 1 and len(whole.layers_in("clusters")) == 2


@pytest.mark.parametrize(
    ("gone", "missing"),
    [
        (["layers.0.value"], "layers.0.value"),  # half of a layer
        ([f"layers.1.{name}" for name in ROWS], "layers.1.key_post"),  # one with full attention
        (["position"], "position"),
    ],
)
def test_gaps_that_no_stage_has(tmp_path, gone, missing):
    made = samples.artifact()
    made = replace(made, layers=(replace(made.layers[0], window=8), made.layers[1]))
    save(made, tmp_path / "a")
    samples.edit_stage(tmp_path / "a", "reservoir", lambda tensors: [tensors.pop(name) for name in gone])
    with pytest.raises(ArtifactError, match=f"tensor {missing} is missing"):
        load(tmp_path / "a")


def test_a_model_whose_layers_all_have_a_window(tmp_path):
    assert ARCHITECTURES["mistral-window"].settings == {"sliding_window": 8}
    made = calibrate(build("mistral-window"), blocks())
    report = rank_report(made)
    every = [rank for entry in report["layers"] for rank in entry["key_post"]]
    assert report["model"]["key_post"] == np.mean(every) and report["averaged"] == [0, 1, 2]
    found = save(made, tmp_path / "a", card_files(made))
    verify(load(found.folder))
    assert set(found.stages["reservoir"].tensors) == {"token", "position"}
    with pytest.raises(KvcalError, match="all layers have a sliding window and keep the model's own cache"):
        cluster(found)
    assert "means over all 3 layers, since all have one" in (tmp_path / "a" / "README.md").read_text()
