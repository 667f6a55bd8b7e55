"""What only real processes show: same bytes twice, Ctrl-C, SIGKILL, no network.

Where the imports themselves do not matter, processes are forked from a server that has them (`ranks`).
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import ranks
from cli_runs import run

from kvcal.artifacts import load


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    rng = random.Random(1)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(rng.choice("abcdefgh \n") for _ in range(40_000)))
    return path


def command(*arguments):
    return [sys.executable, "-m", "kvcal.calibrate", *map(str, arguments)]


def pca(model, text, output, *more):
    options = ("--num-tokens", 8192, "--seq-len", 64, "--reservoir", 200, "--checkpoint-every", 0.2)
    return ("pca", "--model", model, "--data", text, "--output", output, *options, *more)


@pytest.fixture
def started(tmp_path):
    """Start a command, each time in a process of its own."""
    count = iter(range(100))

    def start(arguments, prelude=""):
        return ranks.start(tmp_path / f"process-{next(count)}", list(arguments), 1, prelude)

    return start


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def straight(tmp_path_factory, tiny_model_folder, text):
    """The artifact of an uninterrupted run, for all to compare with."""
    folder = tmp_path_factory.mktemp("straight") / "a"
    run(*pca(tiny_model_folder, text, folder))
    return folder


def test_two_runs_in_two_processes_give_byte_identical_artifacts(tmp_path, tiny_model_folder, text, straight, started):
    """This one and one that the server forks: they have other seeds of Python's hashes."""
    shutil.copytree(straight, tmp_path / "first")
    assert started(pca(tiny_model_folder, text, tmp_path / "second")).wait() == [0]
    run("cluster", tmp_path / "first", "--clusters", 6)
    assert started(("cluster", tmp_path / "second", "--clusters", 6)).wait() == [0]
    assert files(tmp_path / "first") == files(tmp_path / "second")


SLOWED = """
import time
from kvcal.calibrate.statistics import StatisticsFitter
begin = StatisticsFitter.begin_batch
def slow(self, *args):
    print("batch", flush=True)
    time.sleep(0.05)
    return begin(self, *args)
StatisticsFitter.begin_batch = slow
"""


def slowed(job, batches, send):
    """Send a signal to a command with slow batches after some of them; (exit code, stderr)."""
    job.until(lambda: job.out(0).count("batch\n") >= batches)
    job.kill(0, send)
    (code,) = job.wait()
    return code, "\n".join(job.err)


@pytest.mark.parametrize("send", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_says_how_to_go_on_and_exits_as_shells_have_it(
    tmp_path, tiny_model_folder, text, straight, started, send
):
    arguments = pca(tiny_model_folder, text, tmp_path / "a")
    code, err = slowed(started(arguments, SLOWED), 10, send)
    assert code == 128 + send and "interrupted after" in err and "--resume" in err and "Traceback" not in err
    assert not (tmp_path / "a").exists()
    assert started((*arguments, "--resume")).wait() == [0]
    assert files(tmp_path / "a") == files(straight)


def test_killed_in_the_middle_the_run_resumes_to_the_same_bytes(tmp_path, tiny_model_folder, text, straight, started):
    arguments = pca(tiny_model_folder, text, tmp_path / "a")
    code, _ = slowed(started(arguments, SLOWED), 40, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert list((tmp_path / "a.partial").glob("*.json")) and not (tmp_path / "a").exists()
    refused = started(arguments)
    assert refused.wait() == [2] and "add --resume" in refused.err[0]
    assert started((*arguments, "--resume")).wait() == [0]
    assert files(tmp_path / "a") == files(straight)


def test_without_a_network_a_hub_model_fails_in_one_line_within_seconds(tmp_path, text):
    # An address that nothing listens on: refused at once, as without a network.
    env = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    began = time.monotonic()
    done = subprocess.run(command(*pca("mistral-7b", text, tmp_path / "a")), capture_output=True, text=True, env=env)
    assert done.returncode == 2 and time.monotonic() - began < 60
    assert done.stderr.count("\n") == 1 and "mistralai/Mistral-7B-v0.1" in done.stderr


def test_json_output_is_alone_on_stdout_and_stderr_shows_no_progress_bar(tmp_path, tiny_model_folder, text, started):
    with_progress = "import os\nos.environ.pop('KVCAL_PROGRESS', None)"
    done = started(pca(tiny_model_folder, text, tmp_path / "a", "--json"), with_progress)
    assert done.wait() == [0] and done.out(0).startswith("{") and done.out(0).endswith("}\n")
    assert not any(mark in line for line in done.err for mark in "━\r\x1b")
    assert load(tmp_path / "a").settings["reservoir"] == 200


@pytest.mark.parametrize("missing", ["click,numpy,transformers,sklearn,faiss", "huggingface_hub", "rich"])
def test_without_the_extra_the_command_says_which_one_in_one_line(missing):
    """Of some packages another one brings click."""
    script = (
        f"import sys\nfor name in {missing!r}.split(','): sys.modules[name] = None\n"
        "sys.argv[1:] = ['models']\nfrom kvcal.calibrate.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True)
    assert done.returncode == 2 and "kvcal[calibrate]" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_reader_that_leaves_is_not_an_error(straight):
    line = " ".join(command("analyze-rank", straight, "--json"))
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {line} | head -1"], capture_output=True, text=True)
    assert done.stdout == "{\n" and "Traceback" not in done.stderr
