"""The results file of an evaluation: written after every step of the work, resumed, and merged with those of peers.

{"settings": {what was evaluated, on what},
 "results": [{"method": …, its parameters, what was measured}, …],
 "partial": {settings that are not finished yet: {batch: raw numbers}}}

What was answered to every sample of the finished ones stands beside it: see `predictions`.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...artifacts import KvcalError
from ...artifacts.locks import locked
from ...artifacts.syncing import in_one_line
from ...artifacts.writing import write_atomically
from ..distributed import World
from . import predictions
from .grid import Setting, key_of
from .measurements import Measured
from .results_file import SAME, differences, parameters, read_current, short


class Results:
    """Rows that are finished and raw numbers of those that are not; on the disk when it has a path."""

    def __init__(self, settings: Mapping[str, Any], path: Path | None = None):
        self.settings = dict(settings)
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self.predictions: list[predictions.Line] = []
        """Of the samples of settings that were finished here."""
        self._predictions_are_new = True
        self._partial: dict[str, dict[str, Any]] = {}
        self._replaces = False
        """Whether results of other settings at its path are to be replaced."""
        self._share = False
        """Whether the file has one rank's share only."""

    @classmethod
    def open(cls, settings: Mapping[str, Any], path: Path, *, replace: bool = False) -> Results:
        """The results at `path`; none yet where there is no file.

        Args:
            replace: results of other settings give way when the first of these are written.

        Raises:
            KvcalError: not a results file, or one of other settings; it stays as it is.
        """
        results = cls(settings, path)
        results._replaces = replace
        if path.exists():
            results._load()
        predictions.check(predictions.beside(path))
        for share in results._shares():  # of ranks whose job was interrupted
            of_rank = cls(settings, share)
            of_rank._replaces = replace
            of_rank._load()
            results.take(of_rank.unfinished)
        return results

    def row(self, setting: Setting) -> dict[str, Any] | None:
        """The finished row of a setting."""
        return next((row for row in self.rows if key_of(parameters(row)) == key_of(setting)), None)

    def partial(self, setting: Setting) -> Mapping[str, Any]:
        """Raw numbers of a setting that is not finished, by batch."""
        return self._partial.get(key_of(setting), {})

    @property
    def unfinished(self) -> dict[str, dict[str, Any]]:
        """Raw numbers of all settings that are not finished, as `take` takes them."""
        return self._partial

    def take(self, unfinished: Mapping[str, Mapping[str, Any]]) -> None:
        """Add what another process measured of the same settings."""
        finished = {key_of(parameters(row)) for row in self.rows}
        for key, batches in unfinished.items():
            if key in finished:
                continue
            self._partial.setdefault(key, {}).update(batches)

    def for_rank(self, world: World) -> Results:
        """Rank 0's results, for every rank; the others keep what they measure in files of their own, beside rank 0's.

        Raises:
            KvcalError: the ranks do not evaluate the same.
        """
        if world.size == 1:
            return self
        if world.first:
            self.write()
        by_rank = world.exchange([{name: self.settings.get(name) for name in SAME}, self.rows, self._partial])
        for rank, (settings, _, _) in enumerate(by_rank):
            for name, there, ours in differences(settings, by_rank[0][0]):
                raise KvcalError(
                    f"rank {rank} evaluates something else than rank 0 ({name} {short(there)}, {short(ours)} on "
                    "rank 0): give all of them the same files and the same command"
                )
        if world.first:
            return self
        path = self.path.with_name(f"{self.path.name}.rank-{world.rank}") if self.path else None
        mine = Results(self.settings, path)
        _, mine.rows, mine._partial = by_rank[0]
        mine._share = True
        return mine

    def remove_shares(self) -> None:
        """Delete the other ranks' files, once this one has all that they measured."""
        for path in self._shares():
            path.unlink(missing_ok=True)

    def _shares(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{glob.escape(self.path.name)}.rank-*")) if self.path else []

    def _load(self) -> None:
        assert self.path is not None
        body = read_current(self.path)
        # As JSON has them: tuples are lists there.
        different = differences(body["settings"], json.loads(json.dumps(self.settings)))
        if different and self._replaces:
            return
        for name, there, asked in different:
            more = f" and {len(different) - 1} more" if len(different) > 1 else ""
            raise KvcalError(
                f"{self.path}: holds results of other settings ({name} {short(there)} there, {short(asked)} asked "
                f"for{more}): choose another --output, or add --force to replace it"
            )
        self.rows, self._partial = body["results"], body.get("partial", {})

    def add(self, setting: Setting, batch: str, measured: Measured) -> None:
        self._partial.setdefault(key_of(setting), {})[batch] = measured.as_json()

    def finish(self, setting: Setting, row: dict[str, Any]) -> None:
        """Keep the row and the predictions, and drop the raw numbers that it was made of."""
        self.rows.append(row)
        self.predictions += predictions.lines_of(setting, self._partial.pop(key_of(setting), {}))
        self._predictions_are_new = True

    def write(self) -> None:
        """Replace the file, keeping what another process has put there since.

        Raises:
            KvcalError: the disk does not take it, or the file is of other settings now.
        """
        if self.path is None:
            return
        with in_one_line(self.path), locked(self.path.parent):
            whole = Results(self.settings, self.path)
            whole._replaces = self._replaces
            if self.path.exists():
                whole._load()
            whole.rows += [row for row in self.rows if whole.row(parameters(row)) is None]
            on_disk, whole._partial = whole._partial, {}
            for unfinished in (on_disk, self._partial):
                whole.take(unfinished)
            body = {"settings": whole.settings, "results": whole.rows}
            if whole.unfinished:
                body["partial"] = whole.unfinished
            if self._predictions_are_new and not self._share:
                # Before the rows: a row without its predictions would not be measured again.
                finished = [parameters(row) for row in whole.rows]
                predictions.write(predictions.beside(self.path), self.predictions, finished)
                self._predictions_are_new = False
            write_atomically(self.path, _encode(body))


def _encode(body: Mapping[str, Any]) -> bytes:
    """JSON for reading, too: lists of numbers stand in one line."""
    text = json.dumps(body, indent=1)  # no string has a line end of its own
    return re.sub(r"\[\n\s+([-+.\w]+(?:,\n\s+[-+.\w]+)*)\n\s+\]", _in_one_line, text).encode() + b"\n"


def _in_one_line(numbers: re.Match[str]) -> str:
    return "[" + re.sub(r",\s+", ", ", numbers[1]) + "]"
