"""RULER's generating scripts, run in a process of their own.

`ruler_script.py` runs them with stand-ins for what they import, and asks this process how many tokens a text has: the
tokenizer, and any code of its own, stays here.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....artifacts import KvcalError
from .ruler_package import INSTALL, root

_DRIVER = Path(__file__).with_name("ruler_script.py")


@dataclass(frozen=True)
class Written:
    """What a script wrote."""

    rows: list[dict[str, Any]]
    """input: a prompt; outputs: its answers."""
    sentences: str | None
    """How the essays were parted into sentences; None: the task has no essays."""


class TooShort(Exception):
    """No sample fits the length that was asked for."""


class Scripts:
    """A process that runs the script of one kind of task, any number of times; started when it is needed."""

    def __init__(self, kind: str):
        self.path = root() / "data" / "synthetic" / f"{kind}.py"
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Scripts:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            with contextlib.suppress(BrokenPipeError):  # it may not have read everything
                self._process.__exit__(None, None, None)
            self._process = None

    def run(
        self,
        arguments: dict[str, Any],
        templates: dict[str, dict[str, str]],
        count: Callable[[str], int],
        sample: Callable[[], None],
    ) -> Written:
        """Run the script; returns what it writes.

        Args:
            arguments: of its command line.
            templates: the package's constants, as the script is to see them.
            count: text -> number of its tokens.
            sample: called before each sample.

        Raises:
            TooShort: no sample fits.
            KvcalError: the script fails, or needs what is not installed.
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
                    self._send(count(message["count"]))
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
