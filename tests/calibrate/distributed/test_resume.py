"""Runs that are killed, by real signals at any moment, and resumed: the bytes of an uninterrupted one."""

import hashlib
import random
import signal

import pytest
from ranks import start

OPTIONS = ("--num-tokens", 32 * 41, "--seq-len", 32, "--reservoir", 60, "--checkpoint-every", 1000)

SLOW = """
import os, time
from kvcal.calibrate.pass_loop import PassLoop
forward = PassLoop._forward
def slow(self, rows):
    time.sleep(0.05 * int(os.environ['WORLD_SIZE']))
    forward(self, rows)
PassLoop._forward = slow
"""


@pytest.fixture(scope="module")
def pca(tmp_path_factory, tiny_model_folder):
    rng = random.Random(1)
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("".join(rng.choice("abcdefgh \n") for _ in range(5_000)))
    return lambda output, *more: [
        *("pca", "--model", tiny_model_folder, "--data", text, "--output", output, *OPTIONS, *more)
    ]


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize(("size", "attempts"), [(1, 4), (2, 6)])
def test_killed_again_and_again_it_ends_at_the_bytes_of_an_uninterrupted_run(tmp_path, pca, size, attempts):
    assert start(tmp_path / "logs", pca(tmp_path / "straight"), size).wait() == [0] * size
    rng = random.Random(size)
    output, kills, states = tmp_path / "a", 0, set()
    for attempt in range(60):
        arguments = pca(output, "--checkpoint-blocks", 2, *(["--resume"] if attempt else []))
        job = start(tmp_path / f"logs-{attempt}", arguments, size, SLOW if attempt < attempts else "")
        if attempt < attempts:
            # One rank or all of them, from before the processes meet until after the artifact is there.
            victims = range(size) if rng.random() < 0.5 else [rng.randrange(size)]
            if attempt % 2:
                before = frozenset(states)
                job.until(lambda known=before: {path.name for path in tmp_path.glob("a.partial/*.json")} - known)
            job.processes[0].join(rng.uniform(0, 0.5 if attempt % 2 else 1.5))
            for rank in victims:
                job.kill(rank)
        codes = job.wait() if attempt >= attempts else job.end()
        states |= {path.name for path in tmp_path.glob("a.partial/*.json")}
        if codes == [0] * size:
            break
        kills += -signal.SIGKILL in codes
        assert set(codes) <= {0, 2, 130, 143, -signal.SIGKILL, -signal.SIGTERM}, job.err
        # Each rank keeps one state, but for the moment between a new one's commit and the old one's end.
        assert len(list(tmp_path.glob("a.partial/*.json"))) <= 2 * size
    assert codes == [0] * size and kills >= 2 and len(states) >= 2
    assert hashes(output) == hashes(tmp_path / "straight") and len(hashes(output)) == 5
    assert not list(tmp_path.glob("*.partial"))


DIE_AT = """
import os, pathlib
left = [{moment}]
def counted(call):
    def run(*args, **more):
        left[0] -= rank == {rank}
        if left[0] == 0:
            os.kill(os.getpid(), 9)
        return call(*args, **more)
    return run
for owner, name in ((os, "fsync"), (os, "rename"), (pathlib.Path, "unlink")):
    setattr(owner, name, counted(getattr(owner, name)))
"""


@pytest.mark.parametrize("size", [1, 2])
def test_killed_at_every_step_of_saving_it_ends_at_the_same_bytes(tmp_path, pca, size):
    """A save with its clean-up is six syncs and renames, and two or three removals."""
    assert start(tmp_path / "logs", pca(tmp_path / "straight"), size).wait() == [0] * size
    for moment in range(1, 12):
        arguments = pca(tmp_path / "a", "--checkpoint-blocks", 2, *(["--resume"] if moment > 1 else []))
        job = start(tmp_path / "logs", arguments, size, DIE_AT.format(moment=moment, rank=size - 1))
        assert job.wait()[size - 1] == -signal.SIGKILL
    assert start(tmp_path / "logs", pca(tmp_path / "a", "--resume"), size).wait() == [0] * size
    assert hashes(tmp_path / "a") == hashes(tmp_path / "straight")


def test_a_kill_loses_at_most_the_blocks_since_the_last_state(tmp_path, pca):
    kill = """
import os
from kvcal.calibrate.pass_loop import PassLoop
forward, seen = PassLoop._forward, []
def kill(self, rows):
    seen.append(rows)
    if len(seen) == 12:
        os.kill(os.getpid(), 9)
    forward(self, rows)
PassLoop._forward = kill
"""
    job = start(tmp_path / "logs", pca(tmp_path / "a", "--checkpoint-blocks", 3), 1, kill)
    assert job.wait() == [-signal.SIGKILL]
    assert [path.name for path in tmp_path.glob("a.partial/*.json")] == ["blocks-0-of-1.9.json"]


@pytest.mark.parametrize(("sizes", "named"), [((2, 1), "2 process"), ((1, 2), "1 process"), ((3, 2), "3 process")])
def test_another_number_of_processes_is_refused_and_nothing_lost(tmp_path, pca, sizes, named):
    first, second = sizes
    job = start(tmp_path / "logs", pca(tmp_path / "a", "--checkpoint-blocks", 1), first, SLOW)
    job.until(lambda: list(tmp_path.glob("a.partial/*-0-of-*.json")))
    job.kill(0)
    job.wait()
    before = sorted(tmp_path.glob("a.partial/*"))
    again = start(tmp_path / "again", pca(tmp_path / "a", "--resume"), second)
    assert again.wait() == [2] * second
    assert len(again.err) == 1 and f"interrupted run of {named}" in again.err[0]
    assert sorted(tmp_path.glob("a.partial/*")) == before


def test_a_signal_to_all_ranks_saves_all_of_them(tmp_path, pca):
    """As a scheduler that preempts the job does; under torchrun Ctrl-C arrives twice."""
    assert start(tmp_path / "logs", pca(tmp_path / "straight"), 2).wait() == [0, 0]
    job = start(tmp_path / "logs", pca(tmp_path / "a", "--checkpoint-blocks", 1), 2, SLOW)
    job.until(lambda: len(list(tmp_path.glob("a.partial/*.json"))) >= 2)
    for number in (signal.SIGINT, signal.SIGINT):
        for rank in range(2):
            job.kill(rank, number)
    codes = job.wait()  # a rank that notices first that the other has gone ends with 2
    assert 130 in codes and {*codes} <= {2, 130}
    (line,) = job.err
    assert "interrupted after" in line and "add --resume" in line
    assert start(tmp_path / "logs", pca(tmp_path / "a", "--resume"), 2).wait() == [0, 0]
    assert hashes(tmp_path / "a") == hashes(tmp_path / "straight")
