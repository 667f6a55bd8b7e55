"""Ctrl-C and SIGTERM wherever they come: one line, exit code 130 or 143. (In the pass: test_processes.)"""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
from cli_runs import invoke

from kvcal.calibrate.interrupts import Interrupted, Terminated

MAIN = """
import os, signal, sys

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == TARGET and not hasattr(self, "came"):
            self.came = True
            try:
                os.kill(os.getpid(), SIGNAL)
                for _ in range(10): pass
            except BaseException:
                if HIDDEN:  # as a library's own code between the import and us may
                    raise ValueError("something went wrong")
                raise

sys.meta_path.insert(0, Interrupting())
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background begins with it ignored
from kvcal.calibrate.__main__ import main
sys.argv = ["calibrate", *ARGUMENTS]
main()
"""


def interrupted_at(import_of: str, number: int, arguments: list[str], cwd, hidden: bool = False):
    names = {"TARGET": import_of, "SIGNAL": int(number), "HIDDEN": hidden, "ARGUMENTS": arguments}
    code = "\n".join(f"{name} = {value!r}" for name, value in names.items()) + MAIN
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd)


PCA = ["pca", "--model", "demo", "--data", "stdlib", "--output", "out"]


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "import_of", ["kvcal.calibrate.cli", "click", "kvcal.calibrate.cli.pca", "torch", "transformers"]
)
def test_while_something_is_imported(tmp_path, import_of: str, number: int, hidden: bool) -> None:
    done = interrupted_at(import_of, number, PCA, tmp_path, hidden)
    assert done.returncode == 128 + number, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(("Error: interrupted: ", "Error: ended by SIGTERM: ")) and done.stdout == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (
            KeyboardInterrupt,
            130,
            "Error: interrupted: nothing was changed on the disk: repeat the command to begin anew",
        ),
        (Terminated, 143, "Error: ended by SIGTERM: nothing was changed on the disk: repeat the command to begin anew"),
        (Interrupted("saved", signal.SIGTERM), 143, "Error: saved"),
        (Interrupted("saved"), 130, "Error: saved"),
    ],
)
def test_in_a_command(monkeypatch, tmp_path, error, code: int, line: str) -> None:
    def interrupt(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("kvcal.artifacts.load", interrupt)
    done = invoke("inspect", tmp_path)
    assert done.exit_code == code and done.stderr.splitlines() == [line] and done.stdout == ""
