import subprocess
import sys
from types import SimpleNamespace

import pytest
from architectures import build
from samples import FINGERPRINT, artifact

from kvcal import artifacts
from kvcal.artifacts import ModelIdentity, fingerprint, weights_sha256
from kvcal.runtime import ArtifactError, MismatchError, check_model, load


def test_loads_a_folder(tmp_path):
    saved = artifacts.save(artifact(), tmp_path / "a")
    assert load(tmp_path / "a").content_hash == saved.content_hash
    assert load(str(tmp_path / "a")).content_hash == saved.content_hash


def test_loads_a_hub_id_from_a_cache_laid_out_on_disk_without_a_network(tmp_path):
    repository = tmp_path / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / ("a" * 40)
    saved = artifacts.save(artifact(), snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    script = "import kvcal.runtime as r; print(r.load('org/name').content_hash)"
    env = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert out.stdout.strip() == saved.content_hash, out.stderr


def test_a_hub_id_that_is_nowhere_is_one_clear_line(tmp_path):
    script = "import kvcal.runtime as r\ntry: r.load('org/name')\nexcept r.KvcalError as e: print(e)"
    env = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert (
        "model org/name does not exist here and is not in the Hub cache" in out.stdout and out.stdout.count("\n") == 1
    )


@pytest.mark.parametrize("source", ["nowhere", "./no/where", "/no/where", "a/b/c"])
def test_a_folder_that_is_not_there(source):
    with pytest.raises(ArtifactError, match="does not exist: make an artifact with"):
        load(source)


def of_model(model):
    return artifact_with(ModelIdentity("org/model", None, fingerprint(model.config), weights_sha256(model)))


def artifact_with(identity):
    from dataclasses import replace

    return replace(artifact(), model=identity)


def test_the_calibrated_model_is_accepted_in_any_dtype():
    model = build("llama")
    found = of_model(model)
    check_model(found, model, weights=True)


def test_another_architecture_is_refused_naming_both_sides_and_what_to_do():
    expected = rf"fitted for head_dim {FINGERPRINT['head_dim']}.*this model has 128: calibrate this model"
    with pytest.raises(MismatchError, match=expected):
        check_model(artifact(), SimpleNamespace(config=SimpleNamespace(**{**FINGERPRINT, "head_dim": 128})))


def test_other_weights_of_the_same_architecture_are_refused_when_asked():
    found = of_model(build("llama"))
    other = build("llama", seed=1)
    check_model(found, other)
    with pytest.raises(MismatchError, match="other weights"):
        check_model(found, other, weights=True)
