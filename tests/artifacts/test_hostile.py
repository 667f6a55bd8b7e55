"""Artifacts from strangers and from broken disks: one named error each, and never code that runs."""

import dataclasses
import hashlib
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import artifact, edit_manifest, edit_stage

from kvcal.artifacts import SCHEMA_VERSION, ArtifactError, load, save


@pytest.fixture
def folder(tmp_path):
    return save(artifact(), tmp_path / "a").folder


def stage_file(folder, stage="pca"):
    return next(folder.glob(f"{stage}.*.safetensors"))


def test_the_forgers_tools_are_faithful(folder):
    edit_stage(folder, "pca", lambda tensors: None)
    load(folder)


def test_truncated(folder):
    path = stage_file(folder)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match=r"pca\..*truncated"):
        load(folder)


@settings(max_examples=30, deadline=None)
@given(
    where=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 7),
    stage=st.sampled_from(["pca", "moments", "manifest"]),
)
def test_any_flipped_bit_is_noticed(tmp_path_factory, where, bit, stage):
    folder = save(artifact(), tmp_path_factory.mktemp("flip") / "a").folder
    path = folder / "manifest.json" if stage == "manifest" else stage_file(folder, stage)
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= 1 << bit
    path.write_bytes(data)
    try:
        flipped = load(folder)
    except ArtifactError as error:
        assert "\n" not in str(error)
    else:  # white space between two fields of the manifest: the content is the same
        assert stage == "manifest" and json.loads(bytes(data)) == json.loads(
            save(artifact(), tmp_path_factory.mktemp("again") / "a").folder.joinpath("manifest.json").read_text()
        ), flipped


def test_a_missing_file(folder):
    stage_file(folder).unlink()
    with pytest.raises(ArtifactError, match="cannot be read"):
        load(folder)


NAME = "layers.1.key_post.components"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.update({NAME: t[NAME].double()}), f"{NAME} has dtype F64, expected F32"),
        (lambda t: t.update({NAME: t[NAME][:1].clone()}), f"{NAME} has shape .1, 4, 4., expected .Hkv D D."),
        (lambda t: t.update({NAME: t[NAME].flatten()}), f"{NAME} has shape .32., expected"),
        (lambda t: t.pop(NAME), f"{NAME} is missing"),
        (lambda t: t.update({"layers.2.key_post.mean": torch.zeros(2, 4)}), "unexpected tensor layers.2.key_post.mean"),
        (lambda t: t.update({"payload": torch.zeros(1)}), "unexpected tensor payload"),
    ],
)
def test_wrong_dtype_shape_missing_and_extra_tensors_are_named(folder, edit, message):
    edit_stage(folder, "pca", edit)
    with pytest.raises(ArtifactError, match=message):
        load(folder)


def test_a_free_dimension_must_agree_across_layers(folder):
    edit_stage(folder, "reservoir", lambda t: t.update({"layers.1.value": t["layers.1.value"][:, :3].clone()}))
    with pytest.raises(ArtifactError, match=r"layers.1.value has shape \[2, 3, 3\]"):
        load(folder)


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "..",
        "sub/pca.12345678.safetensors",
        "pca.12345678.safetensors/../../x",
        "pca.pkl",
        "pca.12345678.pt",
        "pca.12345678.safetensors\n",
        "pca.12345678.safetensors\x00.pkl",
        "",
        None,
        7,
    ],
)
def test_paths_and_formats_that_are_not_ours_are_refused(folder, name):
    edit_manifest(folder, lambda body: body["stages"]["pca"].update(file=name))
    with pytest.raises(ArtifactError, match="file name"):
        load(folder)


def test_a_pickle_in_place_of_tensors_is_never_run(folder):
    import pickle

    ran = []

    class Bomb:
        def __reduce__(self):
            return ran.append, (1,)

    def plant(body):
        data = pickle.dumps(Bomb())
        digest = hashlib.sha256(data).hexdigest()
        path = folder / f"pca.{digest[:8]}.safetensors"
        path.write_bytes(data)
        body["stages"]["pca"] |= {"file": path.name, "sha256": digest, "bytes": len(data)}

    edit_manifest(folder, plant)
    with pytest.raises(ArtifactError, match="not a readable safetensors file"):
        load(folder)
    assert ran == []


def test_a_newer_schema_is_refused_by_name(folder):
    edit_manifest(folder, lambda body: body.update(schema_version=SCHEMA_VERSION + 1, layers="unknown to us"))
    with pytest.raises(ArtifactError, match=f"schema {SCHEMA_VERSION + 1} is newer than this kvcal reads"):
        load(folder)


@pytest.mark.parametrize(
    "edit",
    [
        lambda body: body.update(schema_version="1"),
        lambda body: body.update(schema_version=True),
        lambda body: body.update(schema_version=0),
        lambda body: body.update(format="other"),
        lambda body: body.update(layers=[]),
        lambda body: body.update(layers={}),
        lambda body: body["layers"].reverse(),
        lambda body: body["layers"][0].update(kv_heads=-1),
        lambda body: body["layers"][0].update(kv_heads=3),
        lambda body: body["layers"][0].update(head_dim=1.5),
        lambda body: body["layers"][0].update(__class__="os.system"),
        lambda body: body.update(stages=[]),
        lambda body: body["stages"].update(unknown=body["stages"]["pca"]),
        lambda body: body["stages"]["pca"].update(sha256=5),
        lambda body: body["stages"]["pca"].update(bytes="many"),
        lambda body: body.pop("model"),
        lambda body: body.update(model="llama"),
        lambda body: body.update(data=None),
        lambda body: body.update(data={}),
        lambda body: body["data"].update(source="text"),
        lambda body: body["data"].update(blocks="many"),
        lambda body: body["layers"][0].update(scaling="x"),
        lambda body: body["layers"][0].update(window=2.5),
        lambda body: body["layers"][0].update(pre_rotary="guess"),
        lambda body: body["model"].update(id=7),
        lambda body: body["model"].update(weights_sha256=None),
    ],
)
def test_malformed_manifests_are_one_line_errors(folder, edit):
    edit_manifest(folder, edit)
    with pytest.raises(ArtifactError) as caught:
        load(folder)
    assert "\n" not in str(caught.value) and "manifest.json" in str(caught.value)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 200_000, b'{"format": "kvcal"}', b" " * (17 << 20)]
)
def test_manifests_that_are_not_manifests(folder, text):
    (folder / "manifest.json").write_bytes(text)
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        load(folder)


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=8,
    ),
    st.sampled_from(["model", "layers", "data", "settings", "versions", "stages"]),
)
def test_any_json_in_any_field_is_accepted_or_refused_by_name(tmp_path_factory, value, field):
    folder = save(artifact(), tmp_path_factory.mktemp("fuzz") / "a").folder
    edit_manifest(folder, lambda body: body.update({field: value}))
    try:
        loaded = load(folder)
    except ArtifactError:
        return
    assert field in {"settings", "versions", "stages"} and dataclasses.is_dataclass(loaded)


def test_a_folder_without_manifest_and_a_missing_folder(tmp_path):
    with pytest.raises(ArtifactError, match=r"not an artifact \(no manifest.json\)"):
        load(tmp_path)
    with pytest.raises(ArtifactError, match="nowhere: does not exist"):
        load(tmp_path / "nowhere")
