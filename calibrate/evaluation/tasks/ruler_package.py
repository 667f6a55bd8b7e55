"""RULER as a package has it: its tasks, its scoring, and its generating scripts, run in a process of their own.

Nothing of it is copied: `nvidia-long-context-eval` is read where it is installed. The scripts' imports are answered by
`ruler_script.py`, which asks here how many tokens a text has, so no tokenizer leaves this process.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from ....artifacts import KvcalError

PACKAGE = "nvidia-long-context-eval"
VERSION = "26.3"
"""The one that the tests pass with."""
NAMES = (
    *("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
    *("niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2"),
)
INSTALL = f"pip install 'kvcal[ruler]' && pip install --no-deps {PACKAGE}=={VERSION}"
_DRIVER = Path(__file__).with_name("ruler_script.py")


@dataclass(frozen=True)
class RulerTask:
    """One of RULER's tasks, as the package describes it."""

    kind: str
    """The script's name: niah, variable_tracking, …"""
    arguments: dict[str, Any]
    """Of the script."""
    new_tokens: int
    template: str
    """With {context} and what the script fills in."""
    answer_prefix: str
    """With which the answer begins."""
    scoring: str
    """A name in `SCORINGS`."""


@dataclass(frozen=True)
class Written:
    """What a script wrote."""

    rows: list[dict[str, Any]]
    """input: a prompt; outputs: its answers."""
    sentences: str | None
    """How the essays were parted into sentences; None: there are none."""


class TooShort(Exception):
    """No sample fits the length that was asked for."""


def installed_version() -> str:
    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return "unknown"


@cache
def _root() -> Path:
    found = importlib.util.find_spec("long_context_eval")
    if found is None or not found.origin:
        raise KvcalError(f"RULER's tasks are written by the package {PACKAGE}, which is not installed: {INSTALL}")
    return Path(found.origin).parent


def ruler_tasks() -> dict[str, RulerTask]:
    """All of them by name.

    Raises:
        KvcalError: the package is not installed, or another version has something else in its place.
    """
    import yaml

    root = _root()
    try:
        listed = yaml.safe_load((root / "synthetic.yaml").read_text(encoding="utf-8"))
        kinds = _load(root / "data" / "synthetic" / "constants.py").TASKS
        scored = _load(root / "eval" / "synthetic" / "constants.py").TASKS
        found = {
            name: RulerTask(
                kind=(kind := listed[name]["task"]),
                arguments=dict(listed[name]["args"]),
                new_tokens=int(kinds[kind]["tokens_to_generate"]),
                template=kinds[kind]["template"],
                answer_prefix=kinds[kind]["answer_prefix"],
                scoring=scored[kind]["metric_fn"].__name__,
            )
            for name in NAMES
        }
    except Exception as error:
        raise _other_version(f"{type(error).__name__}: {error}") from None
    return found


def metric(name: str, prediction: str, answers: Sequence[str]) -> float:
    """The package's score of one prediction, 0 to 1."""
    found = getattr(_scoring(), f"{name}_per_sample", None)
    if found is None:
        raise _other_version(f"no {name}_per_sample")
    return float(found([prediction], [list(answers)])[0]) / 100


@cache
def _scoring() -> Any:
    return _load(_root() / "eval" / "synthetic" / "constants.py")


def _load(path: Path) -> Any:
    """A file as a module of its own, without the package around it, which needs much that we do not."""
    spec = importlib.util.spec_from_file_location(f"ruler_{path.parent.parent.name}_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def _other_version(what: str) -> KvcalError:
    return KvcalError(
        f"{PACKAGE} {installed_version()} is not as kvcal knows it ({what}): pip install --no-deps {PACKAGE}=={VERSION}"
    )


class Scripts:
    """A process that runs the scripts of one kind, one after the other; started when it is needed.

    Args:
        count: text -> number of its tokens.
    """

    def __init__(self, kind: str, count: Callable[[str], int]):
        self.path = _root() / "data" / "synthetic" / f"{kind}.py"
        self.count = count
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Scripts:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            with contextlib.suppress(BrokenPipeError):  # of what it did not read
                self._process.__exit__(None, None, None)
            self._process = None

    def run(
        self, arguments: dict[str, Any], templates: dict[str, dict[str, str]], sample: Callable[[], None]
    ) -> Written:
        """What the script writes.

        Args:
            arguments: of its command line.
            templates: the package's constants, as the script is to see them.
            sample: called before each sample.

        Raises:
            TooShort: no sample fits.
            KvcalError: it fails, or needs what is not installed.
        """
        with tempfile.TemporaryDirectory(prefix="kvcal-") as folder:
            given = {"save_dir": folder, "save_name": "task", "tokenizer_path": "kvcal", **arguments}
            essays = arguments.get("type_haystack") == "essay"
            self._send(
                {
                    "script": str(self.path),
                    "arguments": [f"--{name}={value}" for name, value in given.items()],
                    "tasks": templates,
                    "sentences": essays,
                }
            )
            while True:
                message = self._receive()
                if "count" in message:
                    self._send(self.count(message["count"]))
                elif "sample" in message:
                    sample()
                elif "rows" in message:
                    return Written(message["rows"], message["sentences"] if essays else None)
                else:
                    self.__exit__()
                    if "stuck" in message:
                        raise TooShort(message["stuck"])
                    if message.get("missing"):
                        raise KvcalError(f"RULER's {self.path.name} needs {message['missing']}: {INSTALL}")
                    raise KvcalError(
                        f"RULER's {self.path.name} failed ({message['failed']}): give longer --lengths or another "
                        f"--seed; if it always fails, {INSTALL}"
                    )

    def _send(self, message: Any) -> None:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, str(_DRIVER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                encoding="utf-8",
                # Sets of texts in the same order, whatever the hash seed here is.
                env={**os.environ, "PYTHONHASHSEED": "0", "PYTHONIOENCODING": "utf-8"},
            )
            self._send({"path": [entry for entry in sys.path if entry]})
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def _receive(self) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        found: dict[str, Any] = json.loads(line)
        return found

    def _ended(self) -> KvcalError:
        assert self._process is not None
        code = self._process.wait()
        why = f"signal {-code}, perhaps for want of memory" if code < 0 else f"exit code {code}"
        return KvcalError(f"RULER's {self.path.name} ended early ({why}): run it again, or {INSTALL}")
