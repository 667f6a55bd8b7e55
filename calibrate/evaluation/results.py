"""The results file of an evaluation: written after every step of the work, resumed, and merged with those of peers.

{"settings": {what was evaluated, on what},
 "results": [{"method": …, its parameters, what was measured}, …],
 "partial": {settings that are not finished yet: {batch: raw numbers}}}
"""

from __future__ import annotations

import errno
import glob
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...artifacts import KvcalError
from ...artifacts.locks import locked
from ...artifacts.syncing import in_one_line
from ...artifacts.writing import write_atomically
from ..distributed import World
from .grid import Setting, key_of
from .measurements import MEASURED, Measured

SAME = ("weights_sha256", "tokens_sha256", "dtype", "batch_size")
"""Settings that must agree for rows of two files to stand in one table."""


class Results:
    """Rows that are finished and raw numbers of those that are not; on the disk when it has a path."""

    def __init__(self, settings: Mapping[str, Any], path: Path | None = None):
        self.settings = dict(settings)
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self._partial: dict[str, dict[str, Any]] = {}

    @classmethod
    def open(cls, settings: Mapping[str, Any], path: Path) -> Results:
        """What is at `path`, or nothing yet.

        Raises:
            KvcalError: not a results file, or one of other settings; it stays as it is.
        """
        results = cls(settings, path)
        if path.exists():
            results._load()
        for share in results._shares():  # of ranks whose job was interrupted
            results.take(cls.open(settings, share).unfinished)
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
        """What rank 0 has, for every rank; the others keep what they measure in files of their own, beside its.

        Raises:
            KvcalError: the ranks do not evaluate the same.
        """
        if world.size == 1:
            return self
        if world.first:
            self.write()
        found = world.exchange([{name: self.settings.get(name) for name in SAME}, self.rows, self._partial])
        for rank, (settings, _, _) in enumerate(found):
            for name, there, ours in _differences(settings, found[0][0]):
                raise KvcalError(
                    f"rank {rank} evaluates something else than rank 0 ({name} {_short(there)}, {_short(ours)} on "
                    "rank 0): give all of them the same files and the same command"
                )
        if world.first:
            return self
        path = self.path.with_name(f"{self.path.name}.rank-{world.rank}") if self.path else None
        mine = Results(self.settings, path)
        _, mine.rows, mine._partial = found[0]
        return mine

    def remove_shares(self) -> None:
        """Of the other ranks, once this file has all of it."""
        for path in self._shares():
            path.unlink(missing_ok=True)

    def _shares(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{glob.escape(self.path.name)}.rank-*")) if self.path else []

    def _load(self) -> None:
        assert self.path is not None
        body = _read(self.path)
        # As JSON has them: tuples are lists there.
        different = _differences(body["settings"], json.loads(json.dumps(self.settings)))
        for name, there, asked in different:
            more = f" and {len(different) - 1} more" if len(different) > 1 else ""
            raise KvcalError(
                f"{self.path}: holds results of other settings ({name} {_short(there)} there, {_short(asked)} asked "
                f"for{more}): choose another --output, or remove it"
            )
        self.rows, self._partial = body["results"], body.get("partial", {})

    def add(self, setting: Setting, batch: str, measured: Measured) -> None:
        self._partial.setdefault(key_of(setting), {})[batch] = measured.as_json()

    def finish(self, setting: Setting, row: dict[str, Any]) -> None:
        """Keep the row and drop the raw numbers that it was made of."""
        self.rows.append(row)
        self._partial.pop(key_of(setting), None)

    def write(self) -> None:
        """Replace the file, keeping what another process has put there since.

        Raises:
            KvcalError: the disk does not take it, or the file is of other settings now.
        """
        if self.path is None:
            return
        with in_one_line(self.path), locked(self.path.parent):
            whole = Results(self.settings, self.path)
            if self.path.exists():
                whole._load()
            whole.rows += [row for row in self.rows if whole.row(parameters(row)) is None]
            found, whole._partial = whole._partial, {}
            for unfinished in (found, self._partial):
                whole.take(unfinished)
            body = {"settings": whole.settings, "results": whole.rows}
            if whole.unfinished:
                body["partial"] = whole.unfinished
            write_atomically(self.path, json.dumps(body, indent=1).encode() + b"\n")


def are_results(path: Path) -> bool:
    """Whether a file holds results of whatever settings."""
    try:
        _read(path)
    except KvcalError:
        return False
    return True


def parameters(row: Mapping[str, Any]) -> Setting:
    """The setting that a row is of."""
    return {name: value for name, value in row.items() if name not in MEASURED}


def compared_rows(settings: Mapping[str, Any], full: Mapping[str, Any], path: str | os.PathLike[str]) -> list[Any]:
    """Rows of another results file, to be put beside ours; each has a "source", by default the file's name.

    Args:
        settings: ours.
        full: our row of `full`, for ratios that the file does not state.

    Raises:
        KvcalError: not a results file, or of another model or other tokens.
    """
    path = Path(path)
    body = _read(path)
    for name in SAME:
        there, ours = body["settings"].get(name), settings.get(name)
        if there != ours:
            kinds = {"weights_sha256": "another model", "tokens_sha256": "other tokens"}
            what = kinds.get(name, f"another {name.replace('_', ' ')}")
            raise KvcalError(
                f"{path}: was evaluated on {what} ({name} {_short(there)} there, {_short(ours)} here): "
                "run both with the same model, data, prefix, continuation, windows, tasks, lengths, episodes and seed"
            )
    rows = []
    for row in body["results"]:
        row = {"source": path.stem, **row}
        if row.get("perplexity_ratio") is None and row.get("perplexity") and full.get("perplexity"):
            row["perplexity_ratio"] = row["perplexity"] / full["perplexity"]
        rows.append(row)
    return rows


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "is no plain file")  # a pipe would be waited for
        body = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise KvcalError(f"{path}: cannot be read ({error.strerror or error}): check the path") from error
    except (ValueError, RecursionError) as error:
        raise KvcalError(f"{path}: not a results file ({error}): give one of `calibrate evaluate --output`") from error
    good = isinstance(body, dict) and isinstance(body.get("settings"), dict) and isinstance(body.get("results"), list)
    if good:
        partial = body.get("partial", {})
        good = isinstance(partial, dict) and all(isinstance(entry, dict) for entry in partial.values())
        # A name, or the settings of every layer.
        good &= all(isinstance(row, dict) and isinstance(row.get("method"), (str, list)) for row in body["results"])
        good = good and all(map(_has_numbers, body["results"]))
    if not good:
        raise KvcalError(f"{path}: not a results file (no settings and results): choose another")
    return body


def _has_numbers(row: Mapping[str, Any]) -> bool:
    """Whether what a table and a figure show of a row is there to be shown."""
    kinds = {"recall": dict, "recall_by_depth": dict, "attention_error": list, "attention_mass": list, "source": str}
    for name in MEASURED:
        value = row.get(name)
        if value is None or (name == "recall_by_depth" and isinstance(value, dict)):
            continue
        if name not in kinds:
            if not _is_number(value) or (name == "bytes_per_step" and not value > 0):
                return False
        elif not isinstance(value, kinds[name]):
            return False
        elif name != "source":
            numbers = value.values() if isinstance(value, dict) else value
            if not all(number is None or _is_number(number) for number in numbers):
                return False
    return True


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and not abs(value) > 1e300


def _differences(there: Mapping[str, Any], asked: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(name, there, asked), first in our own order, nested mappings opened."""
    found = []
    for name in [*asked, *(name for name in there if name not in asked)]:
        a, b = there.get(name), asked.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += [(f"{name}.{inner}", x, y) for inner, x, y in _differences(a, b)]
        elif a != b:
            found.append((name, a, b))
    return found


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 40 else text[:37] + "…"
