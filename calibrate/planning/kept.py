"""What planning has measured, in a file beside the plan: another budget measures nothing again, a killed run goes on.

{"format": 1, "of": {what it was measured on, and how},
 "points": {layer: [a `Point`, …]}, "divergence": {settings of all layers: [by row]},
 "checked": [rows of an evaluation]}
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...artifacts.plain_files import read_plain
from ...artifacts.writing import write_atomically
from ..evaluation.grid import key_of
from .points import Point
from .settings import Setting

FORMAT = 1
_MOST_BYTES = 1 << 28


@dataclass
class Kept:
    """What was measured; `write` keeps it on the disk, where it has a path."""

    measured_on: Mapping[str, Any] = field(default_factory=dict)
    """Model, artifact, text and how it was measured: the key "of" of the file."""
    path: Path | None = None
    points: dict[int, dict[str, Point]] = field(default_factory=dict)
    """By layer and `key_of` a setting."""
    divergence: dict[str, list[float]] = field(default_factory=dict)
    """By row, of settings of all layers as JSON has them."""
    checked: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def open(cls, measured_on: Mapping[str, Any], path: Path) -> tuple[Kept, bool]:
        """(what is at `path`; whether there was a file of something else, which the first `write` replaces)"""
        exists = path.exists()
        try:
            body = json.loads(read_plain(path, _MOST_BYTES)) if exists else {}
            if exists and body["format"] == FORMAT and body["of"] == json.loads(json.dumps(measured_on)):
                points = {
                    int(layer): {key_of(each["setting"]): _point(each) for each in found}
                    for layer, found in body["points"].items()
                }
                diverged = {key: [float(each) for each in by_row] for key, by_row in body["divergence"].items()}
                return cls(measured_on, path, points, diverged, [dict(row) for row in body["checked"]]), False
        except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
            pass  # damaged: measured again
        return cls(measured_on, path), exists

    def missing(self, layer: int, settings: Iterable[Setting]) -> list[Setting]:
        """Those that were not measured in a layer."""
        return [setting for setting in settings if key_of(setting) not in self.points.get(layer, {})]

    def add(self, layer: int, points: Iterable[Point]) -> None:
        self.points.setdefault(layer, {}).update({key_of(point.setting): point for point in points})

    def of_layer(self, layer: int, settings: Sequence[Setting]) -> list[Point]:
        return [self.points[layer][key_of(setting)] for setting in settings]

    def write(self) -> None:
        """Raises KvcalError: the disk does not take it."""
        if self.path is None:
            return
        points = {layer: [asdict(point) for point in found.values()] for layer, found in self.points.items()}
        body = {"format": FORMAT, "of": self.measured_on, "points": points}
        body |= {"divergence": self.divergence, "checked": self.checked}
        write_atomically(self.path, json.dumps(body).encode() + b"\n")


def is_kept(path: Path) -> bool:
    """Whether a file holds measurements of a plan, of whatever model."""
    try:
        body = json.loads(read_plain(path, _MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(body, dict) and type(body.get("format")) is int and "divergence" in body


def beside(plan: Path) -> Path:
    """Where the measurements of a plan are."""
    return plan.with_name(f"{plan.stem}.measured.json")


def _point(body: Mapping[str, Any]) -> Point:
    tuples = {name: tuple(body[name]) for name in ("head_errors", "text_errors")}
    return Point(**{**body, **tuples})
