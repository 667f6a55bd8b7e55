"""A worker process: asked for rows one by one, and killed, with all that it has started, when one takes too long."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from queue import Empty, Queue
from threading import Thread
from typing import Any

MARK = "ROW "
"""Before an answer."""
KEPT = 40
"""Lines that are kept of what it says beside its answers."""
# A group of its own, so that what it has started ends with it; no session, so that it ends with ours.
GROUP: dict[str, Any] = {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}


class Worker:
    def __init__(self, command: Sequence[str], environment: Mapping[str, str], say: Callable[[str], object]):
        """
        Args:
            say: gets what it prints beside its answers.
        """
        self.said: deque[str] = deque(maxlen=KEPT)
        self.alive = True
        self._say = say
        self._process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", **GROUP,
        )  # fmt: skip
        # Read by a thread: a process that the driver holds keeps its output open even when it is killed.
        self._lines: Queue[str | None] = Queue()
        Thread(target=self._pump, daemon=True).start()

    def _pump(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line.rstrip())
        self._lines.put(None)

    def ask(self, row: Mapping[str, Any] | None, seconds: float) -> dict[str, Any]:
        """The answer, or {"failed"}: after that, and where the answer says "restart", it is not `alive`.

        Args:
            row: None: it was given as an argument.
        """
        if row is not None:
            assert self._process.stdin is not None
            with suppress(OSError):  # it has ended: reading tells why
                self._process.stdin.write(json.dumps(row) + "\n")
                self._process.stdin.flush()
        until = time.monotonic() + seconds
        try:
            while (line := self._next(until)) is not None:
                if line.startswith(MARK):
                    with suppress(ValueError):  # half a line of a process that has died
                        answer = json.loads(line.removeprefix(MARK))
                        if answer.pop("restart", False):
                            self.end()
                        return answer
                self.said.append(line)
                self._say(line)
        except Empty:
            self.end()
            return {"failed": f"it took more than {seconds:.0f} s and was stopped"}
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)  # by itself, which tells more than that it was killed
        code = self.end()
        last = next((line for line in reversed(self.said) if line.strip()), "it said nothing")
        return {"failed": f"its process ended with {code}: {last[:160]}"}

    def finish(self, seconds: float) -> int | None:
        """Its exit status, once it has ended by itself; None where it had to be killed."""
        if not self.alive:
            return self._process.returncode
        until = time.monotonic() + seconds
        try:
            while (line := self._next(until)) is not None:
                self.said.append(line)
                self._say(line)
            return self._process.wait(max(until - time.monotonic(), 1))
        except (Empty, subprocess.TimeoutExpired):
            return None
        finally:
            self.end()

    def end(self) -> int | None:
        """Kill it and all that it has started, if there is anything left."""
        self.alive = False
        if self._process.returncode is None:
            with suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(OSError):
            self._process.stdin.close()  # type: ignore[union-attr]
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(10)
        return None

    def _next(self, until: float) -> str | None:
        """The next line; None: there are no more. Raises Empty when it is too late."""
        return self._lines.get(timeout=max(until - time.monotonic(), 0.01))
