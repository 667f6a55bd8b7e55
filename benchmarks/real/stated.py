"""What the page's words state: numbers by model, file, method and bytes, from the JSON.

A template says `{{ smol("methods-2048").ratio("spectral", "1/8") }}` and prints "1.003 ± .002".
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from kvcal.calibrate.evaluation.results_file import parameters
from kvcal.calibrate.evaluation.standard_errors import mean

from ..shared.lookup import NotMeasured, Row, load, only, pick
from ..shared.tables import Estimate
from .page_sharing import exponent
from .settings import LEVELS, at_equal_bytes
from .subjects import SUBJECTS, Subject


def values(folder: Path) -> dict[str, Any]:
    """What a template takes; `smol` and `gemma` give the file of a part."""
    smol, gemma = (partial(Measured, folder, SUBJECTS[name]) for name in ("smollm2-135m", "gemma-3-270m"))
    return {"smol": smol, "gemma": gemma, "nats": nats, "answers": answers, "slope": slope, "needed": needed}


@dataclass(frozen=True)
class Measured:
    """One file of results of a model."""

    folder: Path
    subject: Subject
    part: str

    @property
    def path(self) -> Path:
        return self.folder / f"{self.subject.model}-{self.part}.json"

    @cached_property
    def found(self) -> Any:
        return load(self.path)

    def row(self, method: str, at: str | None = None, **setting: Any) -> Row:
        """The one row of this method with these settings, as `calibrate evaluate` writes it.

        Args:
            at: a level of bytes: only the setting that reads so many.
        """
        rows = list(pick(self.found, ("results",), self.path.name))
        if at is not None:
            length = int(self.part.rpartition("-")[2])
            known = at_equal_bytes(LEVELS[at], self.subject.head_dim, length)
            rows = [row for row in rows if parameters(row) in known]
        return only(rows, {"method": method, **setting}, f"{self.path.name}{f' at {at}' if at else ''}")

    def ratio(self, method: str, at: str | None = None, **setting: Any) -> Estimate:
        """Perplexity over the whole cache's."""
        row = self.row(method, at, **setting)
        return Estimate(row["perplexity_ratio"], row["perplexity_ratio_se"])

    def score(self, method: str, at: str | None = None, task: str = "passkey", **setting: Any) -> Estimate:
        """The share of right answers to a task."""
        row = self.row(method, at, **setting)
        (key,) = [key for key in row["scores"] if key.partition("@")[0] == task] or [task]
        where = f"{self.path.name}, {method}"
        return Estimate(pick(row, ("scores", key), where), pick(row, ("scores_se", key), where), ".2f")

    def scores(self, method: str, **setting: Any) -> Estimate:
        """The mean of all tasks, and its standard error over samples, which are drawn for each task by itself."""
        row = self.row(method, **setting)
        error = sum(error**2 for error in row["scores_se"].values()) ** 0.5 / len(row["scores_se"])
        return Estimate(statistics.mean(row["scores"].values()), error, ".2f")

    def entry(self, *keys: str, **wanted: Any) -> Row:
        """Of files by key: the one entry below these keys with these values, in itself or in its setting."""
        found = pick(self.found, keys, self.path.name)
        rows = [found] if isinstance(found, Mapping) else found
        return only([{**row.get("setting", {}), **row} for row in rows], wanted, ", ".join((self.path.name, *keys)))

    def number(self, name: str, *keys: str, form: str = ".3f", **wanted: Any) -> Estimate:
        """A number of an entry, with its error where it has one."""
        row = self.entry(*keys, **wanted)
        return Estimate(pick(row, (name,), ", ".join((self.path.name, *keys))), row.get(f"{name}_se"), form)

    def error(self, key: str, **wanted: Any) -> Estimate:
        """The attention error with a setting: of files whose keys are a group (or a level of bytes) and a setting."""
        rows = [
            {**entry["setting"], **entry}
            for name, entries in self.found.items()
            if name == key or name.startswith((f"{key} {{", f"{key}: {{"))
            for entry in entries
        ]
        if not rows:
            keys = ", ".join(dict.fromkeys(name.partition("{")[0].rstrip(": ") for name in self.found))
            raise NotMeasured(f"{self.path.name}: no {key!r}; there are {keys}")
        row = only(rows, wanted, f"{self.path.name}, {key}")
        return Estimate(row["error"], row["error_se"])

    def percent(self, name: str, *keys: str, **wanted: Any) -> str:
        return f"{100 * self.number(name, *keys, **wanted).value:.0f}"

    def held(self, method: str, times: float = 1, **setting: Any) -> str:
        """Bytes held, over those of the whole cache.

        Args:
            times: by how much the rows of `full` are larger than in 16 bits.
        """
        return f"{times * self.row(method, **setting)['resident_bytes'] / self.row('full')['resident_bytes']:.3f}"

    def radii(self, count: int) -> str:
        """Of so many balls over that of one, the least and the most of layers; of rotated keys."""
        rows = pick(self.found, ("clusterable", "post"), self.path.name)
        found = [row["radius"][row["counts"].index(count)] for row in rows]
        return f"{min(found):.2f} to {max(found):.2f}"

    def mean_over(self, rows: str, name: str, first: int = 0, form: str = ".1f") -> str:
        """The mean over layers from one on."""
        found = pick(self.found, (rows,), self.path.name)
        return f"{statistics.mean(row[name] for row in found if row['layer'] >= first):{form}}"

    def range_over(self, rows: str, name: str, form: str = ".1f") -> str:
        """The least and the most of layers: "4.5 to 7.0"."""
        found = [row[name] for row in pick(self.found, (rows,), self.path.name)]
        return f"{min(found):{form}} to {max(found):{form}}"


def nats(row: Row, other: Row) -> Estimate:
    """By how many nats a token `row` loses more than `other`, windows paired."""
    return Estimate(*_paired(row["window_nll"], other["window_nll"]))


def answers(row: Row, other: Row) -> Estimate:
    """By what share of the questions `row` answers more than `other`, questions paired."""
    ours, theirs = ([score for task in sorted(one["sample_scores"]) for score in one["sample_scores"][task]]
                    for one in (row, other))  # fmt: skip
    return Estimate(*_paired(ours, theirs), ".2f")


def slope(before: tuple[int, Row, Row], after: tuple[int, Row, Row]) -> Estimate:
    """The exponent of tokens by which the loss falls between two trainings: (tokens, row, its row of `full`)."""
    value, error = exponent(*map(_lost, (before, after)))
    if value is None:
        raise NotMeasured("one of the trainings loses nothing: there is no exponent")
    return Estimate(value, error, ".2f")


def needed(before: tuple[int, Row, Row], after: tuple[int, Row, Row], ratio: float) -> str:
    """Millions of tokens after which the loss would be that of a perplexity ratio, if it went on to fall so."""
    tokens, lost = _lost(after)
    target = math.log(ratio) / statistics.mean(lost)
    return f"{tokens * target ** (1 / slope(before, after).value) / 1e6:.0f}"


def _lost(training: tuple[int, Row, Row]) -> tuple[int, list[float]]:
    tokens, row, full = training
    return tokens, [own - whole for own, whole in zip(row["window_nll"], full["window_nll"], strict=True)]


def _paired(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float | None]:
    return mean([own - other for own, other in zip(ours, theirs, strict=True)])
