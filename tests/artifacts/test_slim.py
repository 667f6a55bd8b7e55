"""The slim form: what stays has its bytes, and the manifest tells what the full artifact was."""

import hashlib
import json

import pytest
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from samples import artifact, clusters, edit_manifest, rescored

from kvcal.artifacts import ArtifactError, KvcalError, load, save, slim, tensor_file
from kvcal.artifacts.slim_form import made_after


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def stage_files(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.fixture
def full(tmp_path):
    return save(artifact().with_stage("clusters", clusters()), tmp_path / "full").folder


@pytest.fixture
def made(full, tmp_path):
    return save(slim(load(full)), tmp_path / "slim").folder


def test_what_stays_keeps_its_bytes_and_the_rest_its_hashes(full, made):
    kept = {
        name: data for name, data in stage_files(full).items() if name.split(".")[0] in ("pca", "score", "clusters")
    }
    assert len(kept) == 3 and stage_files(made) == kept
    was, told = manifest(full), manifest(made)
    full_form = {name: was[name] for name in ("content_hash", "schema_version", "stages")}
    assert told["slim_of"] == full_form and told["schema_version"] == 6 and was["schema_version"] == 1
    assert told["stages"] == {name: was["stages"][name] for name in ("pca", "score", "clusters")}
    changed = ("slim_of", "schema_version", "stages", "content_hash")
    assert {key: value for key, value in told.items() if key not in changed} == {
        key: value for key, value in was.items() if key not in changed
    }


def test_it_says_what_is_left_out_and_where_that_is(full, made):
    found = load(made)
    assert found.left_out == ("moments", "reservoir") and load(full).left_out == () and load(full).slim_of is None
    content = load(full).content_hash[:12]
    for stage in found.left_out:
        with pytest.raises(ArtifactError, match=f"^{made}: no stage '{stage}' .*it is slim: [^\n]* {content}…[^\n]*$"):
            found.require("pca", stage)
    with pytest.raises(ArtifactError, match="no stage 'codebook'") as error:  # which the full one has not either
        found.tensor("codebook", 0, "key")
    assert "it is slim" not in str(error.value)


def test_slim_again_is_the_same(made, tmp_path):
    again = save(slim(load(made)), tmp_path / "again").folder
    assert {path.name: path.read_bytes() for path in again.iterdir()} == {
        path.name: path.read_bytes() for path in made.iterdir()
    }


def test_it_does_not_take_the_place_of_the_full_artifact(full):
    before = stage_files(full)
    with pytest.raises(ArtifactError, match="holds the full artifact, which its slim form would take with it"):
        save(slim(load(full)), full)
    assert stage_files(full) == before and load(full).slim_of is None


def test_without_moments_and_reservoir_there_is_nothing_to_leave_out(made, tmp_path):
    edit_manifest(made, lambda body: body.pop("slim_of"))
    found = load(made)
    assert slim(found) is found and found.left_out == ()


def test_stages_made_afterwards_are_told_apart(made):
    found = load(made)
    assert made_after(found) == []
    saved = save(found.with_stage("score", rescored(found)), made)
    assert made_after(saved) == ["score"] and saved.slim_of == found.slim_of and made_after(load(made)) == ["score"]


@pytest.mark.parametrize("saved", [False, True], ids=["never saved", "with a stage that was not saved"])
def test_what_has_no_hashes_yet_is_refused(full, saved):
    found = load(full).with_stage("score", rescored(load(full))) if saved else artifact()
    with pytest.raises(KvcalError, match="save it first"):
        slim(found)


def test_nothing_to_decode_with_is_refused(full):
    edit_manifest(full, lambda body: [body["stages"].pop(name) for name in ("pca", "score", "clusters")])
    with pytest.raises(KvcalError, match="has nothing to decode with"):
        slim(load(full))


def test_a_manifest_that_says_more_than_this_kvcal_writes_is_refused(full):
    edit_manifest(full, lambda body: body.update(more=1))
    with pytest.raises(KvcalError, match="has another content"):
        slim(load(full))


@pytest.mark.parametrize(
    "forge",
    [
        lambda told: told["stages"]["moments"].update(sha256="0" * 64),
        lambda told: told["stages"].pop("reservoir"),
        lambda told: told.update(content_hash="0" * 64),
        lambda told: told.update(schema_version=2),
        lambda told: told.update(schema_version="1"),
        lambda told: told.update(schema_version=True),
        lambda told: told.update(stages=[]),
        lambda told: told["stages"]["moments"].update(file="../../x"),
        lambda told: told["stages"].update(unknown=told["stages"]["pca"]),
        lambda told: told.update(more=1),
        lambda told: told.clear(),
    ],
)
def test_a_full_form_that_is_none_is_refused(made, forge):
    edit_manifest(made, lambda body: forge(body["slim_of"]))
    with pytest.raises(ArtifactError, match="malformed manifest"):
        load(made)


@pytest.mark.parametrize("full_form", [None, [], 3, "x"])
def test_a_full_form_of_another_type_is_refused(made, full_form):
    edit_manifest(made, lambda body: body.update(slim_of=full_form))
    with pytest.raises(ArtifactError, match="malformed manifest"):
        load(made)


def test_earlier_versions_have_no_slim_form(made):
    edit_manifest(made, lambda body: body.update(schema_version=5))
    with pytest.raises(ArtifactError, match="slim_of in schema 5, which has none"):
        load(made)


def test_what_belongs_to_the_model_cannot_be_changed_under_it(made):
    """The full one's content hash is over that, too."""
    edit_manifest(made, lambda body: body["model"].update(weights_sha256="f" * 64))
    with pytest.raises(ArtifactError, match="slim_of: is not of the content that it names"):
        load(made)


def test_a_file_that_another_program_wrote_keeps_its_bytes(full, tmp_path):
    """With metadata in its header, which kvcal does not write."""
    (path,) = full.glob("pca.*")
    data = to_bytes(load_file(path), metadata={"by": "another"})
    path.unlink()
    name = f"pca.{hashlib.sha256(data).hexdigest()[:8]}.safetensors"
    (full / name).write_bytes(data)
    entry = {"file": name, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    edit_manifest(full, lambda body: body["stages"]["pca"].update(entry))
    made = save(slim(load(full)), tmp_path / "slim").folder
    assert (made / name).read_bytes() == data and made_after(load(made)) == []


@pytest.mark.parametrize("damage", [lambda data: data[:-1] + b"x", lambda data: data[:-1]], ids=["changed", "cut off"])
def test_a_large_file_that_changes_while_it_is_copied_is_refused(full, tmp_path, monkeypatch, damage):
    monkeypatch.setattr(tensor_file, "SMALL", 0)
    found = slim(load(full))
    (path,) = full.glob("score.*")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ArtifactError, match=f"{path.name}: was changed after it was verified"):
        save(found, tmp_path / "slim")
    assert not (tmp_path / "slim").exists()


def test_a_whole_artifact_that_lacks_a_stage_says_what_makes_it(full):
    edit_manifest(full, lambda body: body["stages"].pop("reservoir"))
    with pytest.raises(ArtifactError, match=r"no stage 'reservoir' .*; make it with `calibrate pca`$"):
        load(full).require("reservoir")
