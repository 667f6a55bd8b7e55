"""Every writer on a disk that fails or is interrupted before and after every call, and loses what was not synced.

What is found is always the old state or the new one.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build
from faulty_disk import Crash, FaultyDisk, faults, read_tree, write_tree
from samples import artifact

from kvcal.artifacts import KvcalError, Stage, load, save
from kvcal.artifacts.writing import write_atomically
from kvcal.calibrate.checkpoint import Checkpoint
from kvcal.calibrate.evaluation.results import Results
from kvcal.calibrate.sharing.optimizer import Optimizer
from kvcal.calibrate.sharing.training_state import TrainingState
from kvcal.calibrate.statistics import StatisticsFitter
from kvcal.runtime import CompressedCache, SharingMap, save_cla, shared


@dataclass(frozen=True)
class Writer:
    """How one kind of file gets onto the disk, in a folder `root`."""

    prepare: Callable[[Path], Any]
    """Makes the old state; what it returns is handed to `write`."""
    write: Callable[[Path, Any], None]
    look: Callable[[Path], Any]
    """What is there, as the product reads it: only the old and the new state are right."""


def saved_artifact(root: Path) -> Any:
    return save(artifact(), root / "a", {"README.md": b"old"})


def with_other_scores(root: Path, found: Any) -> None:
    changed = {name: tensor + 1 for name, tensor in found.stages["score"].tensors.items()}
    save(found.with_stage("score", Stage(changed)), root / "a", {"README.md": b"new"})


def content_hash(root: Path) -> Any:
    return load(root / "a").content_hash if (root / "a").exists() and any((root / "a").iterdir()) else None


def one_file(name: str) -> Callable[[Path], Any]:
    return lambda root: (root / name).read_bytes() if (root / name).exists() else None


def begun_pass(root: Path) -> Checkpoint:
    checkpoint = Checkpoint.beside(root / "a", "run")
    checkpoint.save(StatisticsFitter(4), 1)
    checkpoint.lock.release()
    return checkpoint


def go_on(root: Path, checkpoint: Checkpoint) -> None:
    try:
        checkpoint.save(StatisticsFitter(4), 2)
        checkpoint.drop_older(2)
    finally:
        checkpoint.lock.release()


def newest_batch(root: Path) -> int:
    checkpoint = Checkpoint.beside(root / "a", "run")
    done = checkpoint.newest()
    checkpoint.load(done, 4, 0)
    checkpoint.lock.release()
    return done


def optimizer(value: float) -> Optimizer:
    return Optimizer({"w": torch.full((3,), value, requires_grad=True)})


def begun_training(root: Path) -> TrainingState:
    state = TrainingState.beside(root / "a", "run")
    state.save(optimizer(1.0), [{"loss": 1.0}])
    state.lock.release()
    return state


def train_on(root: Path, state: TrainingState) -> None:
    try:
        state.save(optimizer(2.0), [{"loss": 1.0}, {"loss": 0.5}])
    finally:
        state.lock.release()


def trained_steps(root: Path) -> Any:
    state, found = TrainingState.beside(root / "a", "run"), optimizer(0.0)
    history = state.load(found)
    state.lock.release()
    return len(history), found.state()[0]["w"].tolist() if "w" in found.state()[0] else None


def results_of(root: Path) -> Results:
    return Results.open({"model": "m"}, root / "results.json")


def one_row(root: Path) -> None:
    results = results_of(root)
    results.finish({"method": "full"}, {"method": "full"})
    results.write()


def another_row(root: Path, _: Any) -> None:
    results = results_of(root)
    results.finish({"method": "loki"}, {"method": "loki"})
    results.write()


def whole_folder(root: Path) -> Any:
    """But for an abandoned workplace, which nobody reads."""
    if not (root / "m").exists():
        return None
    return {name: content for name, content in read_tree(root / "m").items() if not name.startswith(".kvcal-")}


MODEL = build("llama").eval()


def filled_cache(root: Path) -> CompressedCache:
    cache = CompressedCache(MODEL, None, "full")
    cache.save(root / "c")
    MODEL(input_ids=torch.arange(3, 8)[None], past_key_values=cache, use_cache=True)
    return cache


def export(root: Path, _: Any) -> None:
    with shared(MODEL, SharingMap.parse("0-1,2")):
        save_cla(MODEL, root / "m")


WRITERS = {
    "artifact": Writer(lambda root: None, lambda root, _: save(artifact(), root / "a") and None, content_hash),
    "artifact in an empty folder": Writer(
        lambda root: (root / "a").mkdir(),
        lambda root, _: save(artifact(), root / "a", {"README.md": b"x"}) and None,
        content_hash,
    ),
    "stage": Writer(saved_artifact, with_other_scores, content_hash),
    "plan": Writer(
        lambda root: (root / "plan.json").write_bytes(b"old"),
        lambda root, _: write_atomically(root / "plan.json", b"new"),
        one_file("plan.json"),
    ),
    "recipe": Writer(lambda root: None, lambda root, _: write_atomically(root / "r.yaml", b"new"), one_file("r.yaml")),
    "checkpoint": Writer(begun_pass, go_on, newest_batch),
    "training": Writer(begun_training, train_on, trained_steps),
    "results": Writer(one_row, another_row, lambda root: len(results_of(root).rows)),
    "snapshot": Writer(filled_cache, lambda root, cache: cache.save(root / "c"), one_file("c/cache.safetensors")),
    "export": Writer(lambda root: None, export, whole_folder),
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
    given = writer.prepare(first)
    before, old = read_tree(first), writer.look(first)
    with FaultyDisk(first).in_use() as disk:
        writer.write(first, given)
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
                writer.write(first, given)
            except (KvcalError, KeyboardInterrupt, Crash) as found:
                error = found
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
    print(f"{name}: {disk.calls} calls, {cases} states")
