"""The stage `cla` on disk: its optional and freely named tensors, and the schema version that it needs."""

import json

import pytest
import torch
from related_layers import DIM, HEADS, artifact, layer, with_trained_weights
from samples import artifact as sample

from kvcal.artifacts import ArtifactError, Stage, load, save
from kvcal.calibrate.cla import share


@pytest.fixture
def shared():
    return share(artifact([layer(0), layer(1)]))


def bases(index):
    prefix = f"layers.{index}."
    tensors = {}
    for stage in ("pre", "post"):
        tensors[f"{prefix}key_{stage}.mean"] = torch.zeros(HEADS, DIM)
        tensors[f"{prefix}key_{stage}.components"] = torch.eye(DIM).repeat(HEADS, 1, 1)
        for name in ("eigenvalues", "eigenvalues_uncentred"):
            tensors[f"{prefix}key_{stage}.{name}"] = torch.ones(HEADS, DIM, dtype=torch.float64)
    return tensors


def adding(found, tensors):
    stage = found.stages["cla"]
    return found.with_stage("cla", Stage({**stage.tensors, **tensors}, stage.settings))


def version(folder):
    return json.loads((folder / "manifest.json").read_text())["schema_version"]


def test_an_artifact_states_the_lowest_version_that_has_its_stages(tmp_path, shared):
    save(sample(), tmp_path / "plain")
    save(shared, tmp_path / "shared")
    assert (version(tmp_path / "plain"), version(tmp_path / "shared")) == (1, 2)


def test_weights_and_bases_come_back(tmp_path, shared):
    loaded = load(save(adding(with_trained_weights(shared), bases(0)), tmp_path / "a").folder)
    assert torch.equal(loaded.stages["cla"].tensors["weights.model.layers.0.self_attn.k_proj.weight"], torch.ones(3, 2))
    assert loaded.tensor("cla", 0, "key_post.components").shape == (HEADS, DIM, DIM)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weights.": torch.ones(2)}, "unexpected tensor weights."),
        ({"weights.a/b": torch.ones(2)}, "unexpected tensor weights.a/b"),
        ({"other": torch.ones(2)}, "unexpected tensor other"),
        ({"weights.a": torch.ones(2, dtype=torch.int64)}, "weights.a has dtype I64, expected F32 or BF16 or F16"),
        ({"layers.0.cost_aligned": torch.ones(3, dtype=torch.float64)}, r"has shape \[3\], expected \[L\]"),
        ({"layers.0.key_post.mean": torch.ones(HEADS, DIM)}, "layers.0.key_post.components is missing"),
        ({"layers.7.cost_aligned": torch.ones(2, dtype=torch.float64)}, "unexpected tensor layers.7.cost_aligned"),
    ],
)
def test_what_the_schema_does_not_have_is_refused(tmp_path, shared, tensors, message):
    with pytest.raises(ArtifactError, match=message):
        save(adding(shared, tensors), tmp_path / "a")


def test_half_a_basis_is_refused(tmp_path, shared):
    tensors = bases(0)
    del tensors["layers.0.key_pre.eigenvalues_uncentred"]
    with pytest.raises(ArtifactError, match=r"layers\.0\.key_pre\.eigenvalues_uncentred is missing"):
        save(adding(shared, tensors), tmp_path / "a")


TRAINED = {
    "run": "1234",
    "groups": "0-1",
    "pool": "mean",
    "train": "shared",
    "steps": 9,
    "lr": 1e-3,
    "first_losses": {"loss": 3.5},
    "last_losses": {"loss": 2},
    "earlier": None,
}


def with_settings(found, **settings):
    stage = found.stages["cla"]
    return found.with_stage("cla", Stage(stage.tensors, {**stage.settings, **settings}))


def test_settings_that_readers_go_by_come_back(tmp_path, shared):
    for number, training in enumerate((None, TRAINED, {**TRAINED, "earlier": TRAINED})):
        saved = save(with_settings(shared, uptraining=training), tmp_path / str(number))
        assert load(saved.folder).stages["cla"].settings["uptraining"] == training


@pytest.mark.parametrize("groups", [5, None, "", "9" * 5000, ["0-1"], "0-1\n", "zero", "٠"])
def test_groups_that_are_none_are_refused(tmp_path, shared, groups):
    with pytest.raises(ArtifactError, match="of stage cla: expected as 0-1,2-3") as caught:
        save(with_settings(shared, groups=groups), tmp_path / "a")
    assert "\n" not in str(caught.value)


def test_groups_of_layers_that_the_model_has_not_are_refused(tmp_path, shared):
    with pytest.raises(ArtifactError, match="stage cla names layer 7, the model has 0 to 1"):
        save(with_settings(shared, groups="0-1,2-7"), tmp_path / "a")


ENDLESS = TRAINED
for _ in range(200):
    ENDLESS = {**TRAINED, "earlier": ENDLESS}


@pytest.mark.parametrize(
    "training",
    [
        True,
        {},
        [TRAINED],
        {**TRAINED, "run": 3},
        {**TRAINED, "steps": True},
        {**TRAINED, "steps": -1},
        {**TRAINED, "lr": "fast"},
        {**TRAINED, "lr": 10**400},
        {**TRAINED, "first_losses": [3]},
        {**TRAINED, "last_losses": {"loss": None}},
        {**TRAINED, "last_losses": {}},
        {**TRAINED, "earlier": True},
        ENDLESS,
    ],
)
def test_a_training_that_is_none_is_refused(tmp_path, shared, training):
    with pytest.raises(ArtifactError, match="uptraining of stage cla is malformed"):
        save(with_settings(shared, uptraining=training), tmp_path / "a")


def test_version_1_has_no_such_stage(tmp_path, shared):
    from kvcal.artifacts.manifest import _content_hash

    save(shared, tmp_path / "a")
    path = tmp_path / "a" / "manifest.json"
    body = json.loads(path.read_text())
    del body["content_hash"]
    body["schema_version"] = 1
    path.write_text(json.dumps({**body, "content_hash": _content_hash(body)}))
    with pytest.raises(ArtifactError, match="stage 'cla' in schema 1"):
        load(tmp_path / "a")
