"""Models that are larger than one device: heads dealt to ranks, weights that wait in memory or on disk."""

import random
import sys

import pytest
import torch
from click.testing import CliRunner
from ranks import start

from kvcal.artifacts import KvcalError, load, weights_sha256
from kvcal.calibrate import load_model, make_blocks
from kvcal.calibrate.cli import cli
from kvcal.calibrate.one_pass import calibrate
from kvcal.calibrate.placement import device_map_options, input_device, whole_weights_sha256

OPTIONS = ("--num-tokens", 32 * 7, "--seq-len", 32, "--reservoir", 60, "--batch-size", 2)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    rng = random.Random(1)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(rng.choice("abcdefgh \n") for _ in range(5_000)))
    return path


@pytest.fixture(scope="module", params=["untied", "tied"])
def model(request, tmp_path_factory, tiny_model_folder):
    """The tiny model, and one whose embedding is its head, too."""
    if request.param == "untied":
        return tiny_model_folder
    loaded = load_model(tiny_model_folder)
    config = loaded.model.config
    config.tie_word_embeddings = True
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("tied")
    type(loaded.model)(config).save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


def pca(model, text, output, *more):
    return ["pca", "--model", model, "--data", text, "--output", output, *OPTIONS, *more]


def same_artifact(found, expected):
    """Of float32 activations whose sums over hidden dimensions were added in another order."""
    assert (found.model, found.layers, found.data, found.settings) == (
        expected.model,
        expected.layers,
        expected.data,
        expected.settings,
    )
    reservoir = expected.stages["reservoir"].tensors
    assert torch.equal(found.stages["reservoir"].tensors["token"], reservoir["token"])
    for name, tensor in {**reservoir, **expected.stages["moments"].tensors}.items():
        stage = "reservoir" if name in reservoir else "moments"
        torch.testing.assert_close(found.stages[stage].tensors[name], tensor, rtol=1e-5, atol=1e-6)


def test_heads_dealt_to_two_ranks_give_the_artifact_of_the_whole_model(tmp_path, model, text):
    for name, size, more in (("whole", 1, ()), ("dealt", 2, ("--tp",))):
        job = start(tmp_path / name, pca(model, text, tmp_path / f"a-{name}", *more), size)
        assert job.wait() == [0] * size, job.err
    same_artifact(load(tmp_path / "a-dealt"), load(tmp_path / "a-whole"))


KILL = """
import os, signal
from kvcal.calibrate.pass_loop import PassLoop
forward, seen = PassLoop._forward, []
def kill(self, rows):
    seen.append(rows)
    if rank == 1 and len(seen) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    forward(self, rows)
PassLoop._forward = kill
"""


def test_dealt_heads_resume_to_the_same_bytes(tmp_path, tiny_model_folder, text):
    arguments = pca(tiny_model_folder, text, tmp_path / "straight", "--tp")
    assert start(tmp_path / "logs", arguments, 2).wait() == [0, 0]
    arguments = pca(tiny_model_folder, text, tmp_path / "a", "--tp", "--checkpoint-blocks", 2)
    job = start(tmp_path / "logs", arguments, 2, KILL)
    assert job.wait() == [2, -9]
    assert len(job.err) == 1 and "rank 1 of 2 is gone" in job.err[0]
    again = start(tmp_path / "logs", [*arguments, "--resume"], 2)
    assert again.wait() == [0, 0], again.err
    for path in (tmp_path / "straight").glob("*.safetensors"):
        assert (tmp_path / "a" / path.name).read_bytes() == path.read_bytes()


def test_heads_that_cannot_be_dealt_evenly_are_refused_once(tmp_path, tiny_model_folder, text):
    job = start(tmp_path / "logs", pca(tiny_model_folder, text, tmp_path / "a", "--tp"), 3)
    assert job.wait() == [2, 2, 2]
    assert len(job.err) == 1 and "2 KV heads cannot be dealt to 3 processes evenly" in job.err[0]


@pytest.mark.parametrize("memory", [None, "cpu=60KB", "cpu=1KB"])
def test_weights_on_disk_give_the_artifact_of_the_whole_model(tmp_path, model, text, memory):
    """All in memory, some layers on disk, everything on disk."""
    pytest.importorskip("accelerate", reason="spreads models over devices")
    loaded = load_model(model)
    options = device_map_options("auto", memory, str(tmp_path / "offload"))
    spread = load_model(model, placement=lambda config: options).model
    offloaded = sum(parameter.is_meta for parameter in spread.parameters())
    assert (offloaded > 0) == (memory is not None)
    assert input_device(spread) == torch.device("cpu")
    assert whole_weights_sha256(spread) == weights_sha256(loaded.model)
    blocks = make_blocks([text.read_text()], loaded.tokenizer, num_tokens=32 * 5, seq_len=32)
    found, expected = (calibrate(each, blocks, reservoir=60, batch_size=2) for each in (spread, loaded.model))
    same_artifact(found, expected)
    assert whole_weights_sha256(spread) == weights_sha256(loaded.model)  # still, after it ran


def refused(*arguments):
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == 2 and result.stdout == "", result.output
    (line,) = result.stderr.splitlines()
    return line


def test_bad_placements_are_refused_in_one_line(tmp_path, tiny_model_folder, text):
    def line(*more):
        return refused(*pca(tiny_model_folder, text, tmp_path / "a", *more))

    assert "unknown device map 'everywhere': give one of auto," in line("--device-map", "everywhere")
    assert "give amounts by device" in line("--device-map", "auto", "--max-memory", "20GiB")
    assert "--max-memory goes with --device-map" in line("--max-memory", "cpu=1GiB")
    assert "--tp needs several processes: torchrun" in line("--tp")
    assert "not both" in line("--tp", "--device-map", "auto")


def test_without_accelerate_the_device_map_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(KvcalError, match=r"accelerate is not installed, .* --device-map auto: pip install"):
        device_map_options("auto", None, "offload")
