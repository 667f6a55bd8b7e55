"""The scripts in examples/ run as they stand on the built-in model."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from pages import ROOT

import kvcal
from kvcal.artifacts import save
from kvcal.calibrate import calibrate, load_model

EXAMPLES = ROOT / "examples"


def run(name: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> str:
    made = calibrate("demo", "stdlib", num_tokens=2048, seq_len=512, reservoir=512)
    return str(save(made, tmp_path_factory.mktemp("made") / "demo").folder)


def test_every_example_is_listed() -> None:
    listed = (EXAMPLES / "README.md").read_text()
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        name for name in ("calibrate_and_decode.py", "evaluate_prompts.py", "serve.py") if f"]({name})" in listed
    }


@pytest.mark.slow
def test_a_model_is_calibrated_and_decodes(tmp_path: Path) -> None:
    done = run("calibrate_and_decode.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Artifact(of demo") and len(lines) == 5
    read = {line.split()[0]: int(line.split()[2]) for line in lines[1:]}
    assert read["full"] > max(read["spectral"], read["loki"], read["streaming"])
    assert not list(tmp_path.iterdir())


def test_questions_of_ones_own_are_asked(artifact: str, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps({"context": "a " * 300, "question": "b?", "answers": ["zzz"]}))
    done = run("evaluate_prompts.py", "demo", artifact, "q.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert names == ["full", "spectral", "loki", "clusterkv", "streaming"]
    missing = run("evaluate_prompts.py", "demo", artifact, "none.jsonl", cwd=tmp_path)
    assert missing.returncode == 1 and missing.stderr.startswith("Error: ") and missing.stderr.count("\n") == 1


def test_the_server_is_asked_for_what_compress_takes(artifact: str, monkeypatch: pytest.MonkeyPatch) -> None:
    example = runpy.run_path(str(EXAMPLES / "serve.py"))
    folder = str(ROOT / "src" / "kvcal" / "calibrate" / "builtin" / "demo_model")
    command = example["command"](folder, artifact, ["--port", "8001"])
    asked = json.loads(command[command.index("--additional-config") + 1])["kvcal"]
    assert command[1:5] == ["-m", "vllm.entrypoints.openai.api_server", "--model", folder] and command[-1] == "8001"
    assert asked.pop("artifact") == artifact
    loaded = load_model("demo")
    with kvcal.compress(loaded.model, kvcal.load(artifact), **asked):
        loaded.model.generate(**loaded.tokenizer("import", return_tensors="pt"), max_new_tokens=2)


def test_an_artifact_of_another_model_is_refused_before_the_server_starts(tmp_path: Path) -> None:
    from samples import artifact as other

    save(other(), tmp_path / "other")
    folder = str(ROOT / "src" / "kvcal" / "calibrate" / "builtin" / "demo_model")
    done = run("serve.py", folder, "other", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("Error: other was fitted for ")
