"""Every writer on a disk that fails or is interrupted before and after every call, and loses what was not synced.

What is found is always the old state or the new one.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build
from faulty_disk import Crash, FaultyDisk, faults, read_tree, write_tree
from samples import artifact, rescored

from kvcal.artifacts import Artifact, KvcalError, load, save
from kvcal.artifacts.writing import write_atomically
from kvcal.calibrate.checkpoint import Checkpoint
from kvcal.calibrate.cla.optimizer import Optimizer
from kvcal.calibrate.cla.training_state import TrainingState
from kvcal.calibrate.evaluation.results import Results
from kvcal.calibrate.statistics import StatisticsFitter
from kvcal.runtime import CompressedCache
from kvcal.runtime.cla import SharingMap, save_cla, shared


@dataclass(frozen=True)
class Writer:
    """How one kind of file gets onto the disk, in a folder `root`."""

    prepare: Callable[[Path], Any]
    """Makes the old state."""
    write: Callable[[Path], Any]
    look: Callable[[Path], Any]
    """What is there, as the product reads it: only the old and the new state are right."""


def two_stages() -> Artifact:
    whole = artifact()
    return replace(whole, stages={name: whole.stages[name] for name in ("moments", "score")})


def saved_artifact(root: Path) -> None:
    save(two_stages(), root / "a", {"README.md": b"old"})


def with_other_scores(root: Path) -> None:
    found = load(root / "a")
    save(found.with_stage("score", rescored(found)), root / "a", {"README.md": b"new"})


def content_hash(root: Path) -> Any:
    return load(root / "a").content_hash if (root / "a").exists() and any((root / "a").iterdir()) else None


def one_file(name: str) -> Callable[[Path], Any]:
    return lambda root: (root / name).read_bytes() if (root / name).exists() else None


def pass_until(done: int) -> Callable[[Path], None]:
    def run(root: Path) -> None:
        checkpoint = Checkpoint.beside(root / "a", "run")
        try:
            checkpoint.save(StatisticsFitter(4), done)
            checkpoint.drop_older(done)
        finally:
            checkpoint.lock.release()

    return run


def newest_batch(root: Path) -> int:
    checkpoint = Checkpoint.beside(root / "a", "run")
    done = checkpoint.newest()
    checkpoint.load(done, 4, 0)
    checkpoint.lock.release()
    return done


def optimizer(value: float) -> Optimizer:
    return Optimizer({"w": torch.full((3,), value, requires_grad=True)}, lr=1e-3, warmup=0, steps=2)


def training_until(steps: int) -> Callable[[Path], None]:
    def run(root: Path) -> None:
        state = TrainingState.beside(root / "a", "run")
        try:
            state.save(optimizer(float(steps)), [{"loss": 1.0}] * steps)
        finally:
            state.lock.release()

    return run


def trained_steps(root: Path) -> Any:
    state, found = TrainingState.beside(root / "a", "run"), optimizer(0.0)
    history = state.load(found)
    state.lock.release()
    return len(history), found.state()["w/weight"].tolist()


def results_of(root: Path) -> Results:
    return Results.open({"model": "m"}, root / "results.json")


def row_of(method: str) -> Callable[[Path], None]:
    def run(root: Path) -> None:
        results = results_of(root)
        results.finish({"method": method}, {"method": method})
        results.write()

    return run


def whole_folder(root: Path) -> Any:
    """But for an abandoned workplace, which nobody reads."""
    if not (root / "m").exists():
        return None
    return {name: content for name, content in read_tree(root / "m").items() if not name.startswith(".kvcal-")}


MODEL = build("llama").eval()


def cache_of(tokens: int) -> Callable[[Path], None]:
    def run(root: Path) -> None:
        cache = CompressedCache(MODEL, None, "full")
        MODEL(input_ids=torch.arange(3, 3 + tokens)[None], past_key_values=cache, use_cache=True)
        cache.save(root / "c")

    return run


def export(root: Path) -> None:
    with shared(MODEL, SharingMap.parse("0-1,2")):
        save_cla(MODEL, root / "m")


def nothing(root: Path) -> None:
    pass


WRITERS = {
    "artifact": Writer(nothing, lambda root: save(two_stages(), root / "a"), content_hash),
    "artifact in an empty folder": Writer(
        lambda root: (root / "a").mkdir(),
        lambda root: save(two_stages(), root / "a", {"README.md": b"x"}),
        content_hash,
    ),
    "stage": Writer(saved_artifact, with_other_scores, content_hash),
    "plan": Writer(
        lambda root: (root / "plan.json").write_bytes(b"old"),
        lambda root: write_atomically(root / "plan.json", b"new"),
        one_file("plan.json"),
    ),
    "recipe": Writer(nothing, lambda root: write_atomically(root / "r.yaml", b"new"), one_file("r.yaml")),
    "checkpoint": Writer(pass_until(1), pass_until(2), newest_batch),
    "training": Writer(training_until(1), training_until(2), trained_steps),
    "results": Writer(row_of("full"), row_of("loki"), lambda root: len(results_of(root).rows)),
    "snapshot": Writer(cache_of(5), cache_of(6), one_file("c/cache.safetensors")),
    "export": Writer(nothing, export, whole_folder),
}


@pytest.fixture
def place():
    """In memory: tens of thousands of files are written."""
    import tempfile

    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


@pytest.mark.parametrize("name", WRITERS)
def test_the_old_state_or_the_new_one(place, name):
    writer = WRITERS[name]
    first = place / "first"
    first.mkdir()
    writer.prepare(first)
    before, old = read_tree(first), writer.look(first)
    with FaultyDisk(first).in_use() as disk:
        writer.write(first)
    new = writer.look(first)
    assert new != old
    looked: dict[str, Any] = {}

    def check(tree: Any) -> Any:
        key = repr(tree)
        if key not in looked:
            shutil.rmtree(place / "after", ignore_errors=True)
            (place / "after").mkdir()
            write_tree(place / "after", tree)
            looked[key] = writer.look(place / "after")
        assert looked[key] in (old, new)
        return looked[key]

    cases = 0
    for fault in faults(disk.calls):
        shutil.rmtree(first)
        first.mkdir()
        write_tree(first, before)
        struck = FaultyDisk(first, fault)
        error = None
        with struck.in_use():
            try:
                writer.write(first)
            except (KvcalError, KeyboardInterrupt, Crash) as found:
                error = found
        assert struck.calls > fault.call
        for tree in struck.crashed or [read_tree(first)]:
            state = check(tree)
            cases += 1
        if fault.kind is Crash:
            assert isinstance(error, Crash)
        elif error is None:
            assert state == new
        elif "nothing was changed" in str(error):
            assert state == old, fault
        if fault.kind is KeyboardInterrupt:
            assert isinstance(error, KeyboardInterrupt)
    assert cases > 8 * disk.calls
