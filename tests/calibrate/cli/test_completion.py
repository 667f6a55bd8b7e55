"""What shells are offered for half-typed words, in a process that cannot import torch or transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from kvcal.calibrate.cla.patterns import PATTERNS
from kvcal.calibrate.cli import completion
from kvcal.calibrate.cli.group import COMMANDS
from kvcal.calibrate.data_aliases import DATA_ALIASES
from kvcal.calibrate.dtypes import DTYPES, SHORT
from kvcal.calibrate.evaluation.tasks.names import ON_TEXT
from kvcal.calibrate.models import MODEL_ALIASES
from kvcal.runtime import METHODS
from kvcal.runtime.planned import NAME as PLAN

MAIN = """
import sys
for heavy in ("torch", "transformers", "faiss", "sklearn", "matplotlib", "datasets", "numpy"):
    sys.modules[heavy] = None
from kvcal.calibrate.__main__ import main
sys.argv = [PROGRAM]
main()
"""


def offered(*words: str, program: str = "calibrate") -> dict[str, str]:
    """Word -> its type ("plain", "file", "dir"), for the last of the words typed so far."""
    asked = {f"_{program.upper()}_COMPLETE": "bash_complete", "COMP_CWORD": str(len(words))}
    asked["COMP_WORDS"] = " ".join([program, *(word or "''" for word in words)])
    done = subprocess.run(
        [sys.executable, "-c", MAIN.replace("PROGRAM", json.dumps(f"/some/bin/{program}"))],
        env={**os.environ, **asked},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return {word: kind for kind, word in (line.split(",", 1) for line in done.stdout.splitlines())}


@pytest.mark.parametrize("program", ["calibrate", "kvcal"])
def test_commands_by_either_name(program: str) -> None:
    assert [*offered("", program=program)] == list(COMMANDS)
    assert [*offered("an", program=program)] == ["analyze-rank"]


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (("pca", "--model", ""), sorted(MODEL_ALIASES)),
        (("pca", "--model", "mis"), ["mistral-7b"]),
        (("evaluate", "a", "--data", "wiki"), ["wikitext", "wikitext-103"]),
        (("evaluate", "a", "--data", ""), sorted(DATA_ALIASES)),
        (("evaluate", "a", "--method", "full,lo"), ["full,loki"]),
        (("evaluate", "a", "--tasks", "pass"), ["passkey"]),
        (("plan", "a", "--method", "s"), [name for name in (*METHODS, "cla", PLAN) if name.startswith("s")]),
        (("share", "a", "--pattern", "dense"), ["dense-front", "dense-back"]),
        (("cluster", "a", "--metric", ""), ["cosine", "l2", "joint"]),
        (("export", "a", "--dtype", "b"), ["bfloat16", "bf16"]),
        (("pca", "--num"), ["--num-tokens"]),
    ],
)
def test_names_are_offered(words: tuple[str, ...], names: list[str]) -> None:
    found = offered(*words)
    assert [*found] == names and {*found.values()} == {"plain"}


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (("pca", "--model", "./my"), "file"),
        (("pca", "--data", "/usr/sh"), "file"),
        (("inspect", ""), "dir"),
        (("run", "--recipe", "r"), "file"),
        (("evaluate", "a", "--prompts", "q"), "file"),
        (("pca", "--output", "o"), "file"),
    ],
)
def test_paths_are_left_to_the_shell(words: tuple[str, ...], kind: str) -> None:
    assert [*offered(*words).values()] == [kind]


def test_the_lists_are_those_of_the_rooms_that_need_torch() -> None:
    assert (*METHODS, "cla", PLAN) == completion.METHODS
    assert (*ON_TEXT, "ruler") == completion.TASKS
    assert (*PATTERNS, "auto") == completion.PATTERNS
    assert {*SHORT.values()} <= {*DTYPES}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_has_its_script(shell: str) -> None:
    code = MAIN.replace("PROGRAM", '"kvcal"')
    asked = {"_KVCAL_COMPLETE": f"{shell}_source"}
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **asked}, capture_output=True, text=True)
    assert done.returncode == 0 and "kvcal" in done.stdout and "_KVCAL_COMPLETE" in done.stdout
