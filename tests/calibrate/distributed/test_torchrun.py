"""The command line as users start it: torchrun's own processes, report and exit code."""

import random
import signal
import subprocess
import sys
import time

import gguf_files

from kvcal.artifacts import load

SLOW = """
import os, runpy, time
from kvcal.calibrate.pass_loop import PassLoop
forward = PassLoop._forward
with open(os.environ["PIDS"] + "-" + os.environ["RANK"], "w") as file:  # once: read while it is written it is empty
    file.write(str(os.getpid()))
def slow(self, rows):
    time.sleep(float(os.environ["PAUSE"]))
    forward(self, rows)
PassLoop._forward = slow
from kvcal.calibrate.__main__ import main
main()
"""


def test_torchrun_finishes_or_fails_within_a_minute_of_a_lost_rank(tmp_path, monkeypatch):
    rng = random.Random(1)
    (tmp_path / "text.txt").write_text("".join(rng.choice("abcdefgh \n") for _ in range(5_000)))
    (tmp_path / "slow.py").write_text(SLOW)
    model = gguf_files.write(tmp_path / "tiny.gguf", gguf_files.tiny_llama())  # one of them converts it for both
    monkeypatch.setenv("KVCAL_CACHE", str(tmp_path / "cache"))
    words = ("pca", "--model", model, "--data", tmp_path / "text.txt", "--output", tmp_path / "a")
    words += ("--num-tokens", 32 * 8, "--seq-len", 32, "--reservoir", 60, "--checkpoint-blocks", 1)
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", tmp_path / "slow.py")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PIDS", str(tmp_path / "pid"))
    monkeypatch.setenv("PAUSE", "1")
    command = [str(word) for word in (*launcher, *words)]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("a.partial/blocks-1-of-2.*.json")):
        assert job.poll() is None, job.communicate()
        time.sleep(0.05)
    subprocess.run(["kill", f"-{signal.SIGKILL.value}", (tmp_path / "pid-1").read_text()], check=True)
    _, err = job.communicate(timeout=60)
    assert job.returncode != 0
    (line,) = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert "rank 1 of 2 is gone" in line and "--resume" in line

    monkeypatch.setenv("PAUSE", "0")
    again = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=120)
    assert again.returncode == 0 and again.stdout.count("content ") == 1, again.stderr
    assert load(tmp_path / "a").data["blocks"] == 8
    (entry,) = (tmp_path / "cache" / "gguf").iterdir()
    assert [path.name for path in entry.iterdir()] == ["checkpoint"]
