"""Runs phases of rows in worker processes, within minutes, and saves after every row. `first` and `second` say which.

A row that fails, faults or takes too long says why, and the others go on. What time does not suffice for is skipped.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from . import expected, tools, tree
from .processes import Worker
from .results import brief, save, unproven
from .sizes import DRY, FULL

Row = dict[str, Any]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "2",
    "PYTHONPATH": os.pathsep.join([str(tree.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    "PYTHONUNBUFFERED": "1",
    "PYTHONFAULTHANDLER": "1",
    "TOKENIZERS_PARALLELISM": "0",
}
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
"""Under compute-sanitizer: every tensor is an allocation of its own, whose ends it knows."""
LOG_BYTES = 8 << 20
DRY_TIMES = 20
"""An interpreter on a CPU may take so many times as long."""


@dataclass(frozen=True)
class Phase:
    name: str
    rows: Sequence[Mapping[str, Any]]
    most: float
    """Seconds that it may take."""
    kept: float = 0
    """Seconds that earlier phases leave it."""
    limit: float = 60
    """Seconds of one row."""
    needs: float = 5
    """Seconds that have to be left for a row to begin."""
    at_once: int = 1
    fresh: bool = False
    """A process for every row, not one for all of them until one fails."""


class Run:
    def __init__(
        self, name: str, out: Path, dry: bool, seconds: float, worker: Sequence[str], about: Mapping[str, Any]
    ):
        """
        Args:
            worker: the command that answers rows.
        """
        self.out, self.dry, self.sizes = out, dry, DRY if dry else FULL
        self._worker, self._lock = worker, Lock()
        self._begun, self._seconds = time.monotonic(), seconds
        self._path, self._log = out / f"{name}.json", (out / f"{name}.log").open("a")
        self.results: dict[str, Any] = {"run": name, **about, "seconds": 0.0, "rows": []}
        self._workers: set[Worker] = set()
        self._stopped, self._times = False, DRY_TIMES if dry else 1
        self._checked = [row for other in sorted(out.glob("*.json")) for row in checks_of(other)]

    @property
    def rows(self) -> list[Row]:
        return self.results["rows"]

    @property
    def left(self) -> float:
        return self._seconds - (time.monotonic() - self._begun)

    def go(self, phases: Sequence[Phase]) -> None:
        for at, phase in enumerate(phases):
            kept = self._times * sum(later.kept for later in phases[at + 1 :])
            until = max(self.left - self._times * phase.most, kept)
            self.say(f"{self.left:5.0f} s left: {phase.name}, {len(phase.rows)} rows, until {until:.0f} s are left")
            rows = iter(phase.rows)
            lanes = min(phase.at_once, len(phase.rows))
            if lanes < 2:
                self._lane(phase, rows, until)
                continue
            with ThreadPoolExecutor(lanes) as pool:
                try:
                    for lane in [pool.submit(self._lane, phase, rows, until) for _ in range(lanes)]:
                        lane.result()
                except BaseException:  # told to end, while others would go on
                    self.stop()
                    raise

    def _lane(self, phase: Phase, rows: Iterator[Mapping[str, Any]], until: float) -> None:
        """Measure rows one after the other.

        Args:
            until: seconds of the run that have to be left.
        """
        worker: Worker | None = None
        while (row := self._next(rows)) is not None:
            left = self.left - until
            if left < phase.needs:
                self.put({**row, "skipped": "no time left"})
                continue
            seconds = min(self._times * phase.limit, left)
            if phase.fresh:
                self.put(self.alone(row, seconds))
                continue
            if worker is None or not worker.alive:
                worker = self._start([], {}, [])
            self.put({**row, **worker.ask(row, seconds)})
        if worker is not None:
            worker.end()
            self._workers.discard(worker)

    def _next(self, rows: Iterator[Mapping[str, Any]]) -> Mapping[str, Any] | None:
        with self._lock:
            return None if self._stopped else next(rows, None)

    def alone(self, row: Mapping[str, Any], seconds: float) -> Row:
        """A row in a process of its own, under a tool where its kind has one."""
        begun = time.monotonic()
        watched = tools.watched(row, self.sizes, self.out)
        name, arguments, measured = watched or ("", [], row)
        tool = tools.find(name) if name else None
        missing = {"note": f"{name} was not found"} if name and tool is None else {}
        if missing and not self.dry:
            return {**row, "skipped": missing["note"]}
        before = [tool, *arguments] if tool else []
        worker = self._start(before, UNCACHED if row["kind"] == "sanitizer" else {}, [measured])
        found = worker.ask(None, seconds)
        code = worker.finish(max(seconds - (time.monotonic() - begun), 1))
        self._workers.discard(worker)
        try:
            after = tools.seen(row, self.out, code, worker.said) if tool else {}
        except Exception as problem:  # a file that looks otherwise costs its numbers, not the run
            after = {"failed": f"what {name} wrote was not understood: {problem}"}
        return {**measured, **found, **missing, **after, **row}

    def _start(
        self, before: Sequence[str], environment: Mapping[str, str], rows: Sequence[Mapping[str, Any]]
    ) -> Worker:
        """
        Args:
            before: what the command stands behind.
            rows: those that it is started for.
        """
        given = ["dry" if self.dry else "full", *map(json.dumps, rows)]
        worker = Worker(
            [*before, *self._worker, *given], ENVIRONMENT | environment, lambda line: self.say(f"    {line}")
        )
        self._workers.add(worker)
        return worker

    def put(self, row: Row) -> None:
        """Save and print a row, with what it should have taken and the checks it lacks."""
        if self._stopped:
            return
        with suppress(LookupError, TypeError, ValueError):  # what stands beside a row never costs the row
            rate = expected.rate_of(self.rows) or expected.DATA_SHEET["H100"]
            row = row | expected.beside(row, self.sizes, rate)
            checks = self._checked + [other for other in self.rows if other["kind"] == "check"]
            if checks and (lacking := unproven(row, checks)):
                row["unproven"] = lacking
        with self._lock:
            self.rows.append(row)
            self.save()
        self.say(f"{self.left:5.0f} s left  {brief(row)}")

    def save(self) -> None:
        self.results["seconds"] = round(self._seconds - self.left, 1)
        save(self.results, self._path)

    def say(self, text: str) -> None:
        with suppress(OSError):  # nobody reads it any more
            print(text, flush=True)
        with suppress(OSError):  # a full disk, which ends no run
            if self._log.tell() < LOG_BYTES:
                self._log.write(text[:2000] + "\n")
                self._log.flush()

    def stop(self) -> None:
        self._stopped = True
        for worker in list(self._workers):
            worker.end()

    def close(self) -> None:
        self.stop()
        self._log.close()


def checks_of(path: Path) -> list[Row]:
    """Of another run into the same folder; none of a file of another kind."""
    try:
        return [row for row in json.loads(path.read_text())["rows"] if row["kind"] == "check"]
    except (OSError, ValueError, LookupError, TypeError):
        return []
