"""The calibration pass in several processes: the artifact of one, and one line when it fails."""

import random
import re

import pytest
import torch
from ranks import start
from scipy.linalg import subspace_angles

from kvcal.artifacts import load

BLOCKS = 11
"""Not a multiple of 2 or 3 processes: the last round is ragged; and the last batch is short."""
OPTIONS = ("--num-tokens", 32 * BLOCKS, "--seq-len", 32, "--reservoir", 60, "--batch-size", 2)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    rng = random.Random(1)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(rng.choice("abcdefgh \n") for _ in range(5_000)))
    return path


@pytest.fixture(scope="module")
def pca(tiny_model_folder, text):
    """pca(output, …): the words of the command."""
    return lambda output, *more: [
        *("pca", "--model", tiny_model_folder, "--data", text, "--output", output, *OPTIONS, *more)
    ]


@pytest.fixture(scope="module")
def single(tmp_path_factory, pca):
    folder = tmp_path_factory.mktemp("single")
    assert start(folder / "logs", pca(folder / "artifact"), 1).wait() == [0]
    return load(folder / "artifact")


@pytest.mark.parametrize("size", [2, 3, 7])
def test_any_number_of_processes_finds_what_one_does(tmp_path, pca, single, size):
    """7 processes for 6 batches: one has nothing to do."""
    job = start(tmp_path / "logs", pca(tmp_path / "a"), size)
    assert job.wait() == [0] * size, job.err
    found = load(tmp_path / "a")
    assert (found.model, found.layers, found.data, found.settings) == (
        single.model,
        single.layers,
        single.data,
        single.settings,
    )
    for name, tensor in single.stages["reservoir"].tensors.items():
        assert torch.equal(found.stages["reservoir"].tensors[name], tensor), name
    for name, tensor in single.stages["moments"].tensors.items():
        other = found.stages["moments"].tensors[name]
        if name.endswith("count"):
            assert other == tensor
        else:
            assert (other - tensor).norm() <= 1e-10 * tensor.norm(), name
    for layer in range(2):
        for head in range(2):
            rows, others = (each.tensor("pca", layer, "key_post.components")[head].double() for each in (single, found))
            for rank in (1, 3):
                assert subspace_angles(rows[:rank].numpy().T, others[:rank].numpy().T).max() < 1e-5
    assert "content" in job.out(0) and not any(job.out(rank) for rank in range(1, size))
    assert not [line for line in job.err if "tokens are few for a head dim" not in line]


def test_the_same_command_again_is_recognised_by_all_ranks(tmp_path, pca):
    for _ in range(2):
        job = start(tmp_path / "logs", pca(tmp_path / "a"), 2)
        assert job.wait() == [0, 0], job.err
    assert job.err == [f"{tmp_path / 'a'}: already calibrated with this model, text and settings"]


NAN = """
import torch
from kvcal.calibrate.pass_loop import PassLoop
forward = PassLoop._forward
def broken(self, rows):
    if rank in {ranks}:
        self._model.model.layers[1].self_attn.v_proj.weight.data[0, 0] = float("nan")
    forward(self, rows)
PassLoop._forward = broken
"""


@pytest.mark.parametrize("ranks", [[0], [1], [0, 1, 2]])
def test_nan_on_some_ranks_is_told_once_by_its_line(tmp_path, pca, ranks):
    job = start(tmp_path / "logs", pca(tmp_path / "a"), 3, NAN.replace("{ranks}", str(ranks)))
    assert job.wait() == [2, 2, 2]
    (line,) = job.err
    assert line.startswith("Error: layer 1: NaN or Inf among the value activations")
    assert not (tmp_path / "a").exists()


STOP_AT = """
import os, signal, time
from kvcal.calibrate.pass_loop import PassLoop
forward, seen = PassLoop._forward, []
def stop(self, rows):
    seen.append(rows)
    if rank == {rank} and len(seen) == {batch}:
        os.kill(os.getpid(), signal.SIGKILL)
    forward(self, rows)
PassLoop._forward = stop
"""


@pytest.mark.parametrize(("rank", "batch"), [(0, 1), (1, 2), (2, 1)])
def test_a_killed_rank_ends_the_others_with_one_line(tmp_path, pca, rank, batch):
    """In the first batch, before which ranks settle on how to undo the rotation, and in a later one."""
    job = start(tmp_path / "logs", pca(tmp_path / "a"), 3, STOP_AT.format(rank=rank, batch=batch))
    codes = job.wait(40)
    assert codes[rank] == -9 and all(code == 2 for other, code in enumerate(codes) if other != rank)
    assert job.err == [
        f"Error: rank {rank} of 3 is gone (killed, out of memory, or its machine is), so the others stop: "
        "repeat the command to go on (pca: with --resume)"
    ]


STUCK = """
import os, signal, time
from kvcal.calibrate.distributed import world
from kvcal.calibrate.pass_loop import PassLoop
world.GRACE_SECONDS = 1
def stuck(self, rows):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)
PassLoop._forward = stuck
"""


def test_a_rank_that_is_stuck_does_not_outlive_a_lost_one(tmp_path, pca):
    job = start(tmp_path / "logs", pca(tmp_path / "a"), 2, STUCK)
    assert job.wait(30) == [2, -9]
    assert len(job.err) == 1 and "rank 1 of 2 is gone" in job.err[0]


def test_ranks_with_other_texts_are_told_apart(tmp_path, pca):
    other = "from kvcal.calibrate import inputs\nmake = inputs.make_blocks\n"
    other += "inputs.make_blocks = lambda d, *a, **k: make([t[rank:] for t in d], *a, **k)"
    job = start(tmp_path / "logs", pca(tmp_path / "a"), 2, other)
    assert job.wait() == [2, 2]
    assert len(job.err) == 1 and "rank 1 of 2 has another model, text or settings" in job.err[0]


def test_a_wrong_option_value_is_told_once(tmp_path, pca):
    job = start(tmp_path / "logs", pca(tmp_path / "a", "--device", "tpu"), 2)
    assert job.wait() == [2, 2]
    assert len(job.err) == 1 and re.match(r"Error: unknown device 'tpu'", job.err[0])
