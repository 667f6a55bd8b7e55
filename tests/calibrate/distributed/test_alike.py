"""Ranks that were started otherwise than rank 0: refused before any work, in one line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from ranks import start
from samples import artifact

from kvcal.artifacts import save

PCA = ("pca", "--model", "demo", "--data", "stdlib", "--output")
OTHERS = [
    ("command", "'inspect', 'pca'", ("inspect", "{folder}/a")),
    ("output", "'{folder}/b', '{folder}/a'", (*PCA, "{folder}/b")),
    ("seed", "'1', '0'", (*PCA, "{folder}/a", "--seed", 1)),
]


@pytest.mark.parametrize(("name", "values", "other"), OTHERS, ids=[name for name, *_ in OTHERS])
def test_another_command_line(tmp_path: Path, name: str, values: str, other: tuple[Any, ...]) -> None:
    words = [str(word).replace("{folder}", str(tmp_path)) for word in other]
    job = start(tmp_path / "logs", lambda rank: words if rank else [*PCA, tmp_path / "a"], 2)
    assert job.wait() == [2, 2]
    assert len(job.err) == 1, job.err
    shown = re.escape(f"({name} {values.replace('{folder}', str(tmp_path))} on rank 0)")
    assert re.search(f"rank 1 of 2 was started otherwise than rank 0 {shown}", job.err[0])
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]


def test_another_version_and_another_artifact(tmp_path: Path) -> None:
    other = "from kvcal.calibrate import one_pass\nif rank: one_pass.versions = lambda: {'transformers': '5.9.0'}"
    job = start(tmp_path / "logs", [*PCA, tmp_path / "a"], 2, other)
    assert job.wait() == [2, 2] and len(job.err) == 1 and "version of" in job.err[0]
    for seed in (0, 1):
        save(artifact(layers=1, seed=seed), tmp_path / str(seed))
    elsewhere = "from kvcal.artifacts import folder as opening\nload = opening.load\n"
    elsewhere += "opening.load = lambda folder: load(folder.with_name(str(rank)))"
    job = start(tmp_path / "more", ["cluster", tmp_path / "0"], 2, elsewhere)
    assert job.wait() == [2, 2] and len(job.err) == 1 and "content of ARTIFACT" in job.err[0], job.err


def test_what_runs_in_one_process(tmp_path: Path) -> None:
    job = start(tmp_path / "logs", ["plan", tmp_path / "a"], 2)
    assert job.wait() == [2, 2]
    assert job.err == ["Error: calibrate plan runs in one process, 2 were started: drop torchrun"]
