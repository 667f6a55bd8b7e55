"""What every sample was answered, as JSONL beside the results: a line for each setting, task and sample.

{"setting": {…}, "task": "passkey@1024", "index": 3, "prediction": " 12345", "answers": ["12345"], "score": 1.0,
 "depth": 0.7}
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...artifacts import KvcalError
from ...artifacts.places import check_new_file
from ...artifacts.writing import write_atomically
from .grid import key_of
from .measurements import Measured

Line = dict[str, Any]


def beside(results: Path) -> Path:
    """results.json -> results.predictions.jsonl."""
    return results.with_name(results.name.removesuffix(".json") + ".predictions.jsonl")


def lines_of(setting: Mapping[str, Any], measured: Mapping[str, Any]) -> list[Line]:
    """
    Args:
        measured: raw numbers by `Batch.key`, as JSON has them.
    """
    found = []
    for batch, raw in measured.items():
        task = batch.rpartition(" ")[0]
        found += [{"setting": dict(setting), "task": task, **sample} for sample in Measured(**raw).samples]
    return found


def check(path: Path) -> None:
    """Raises KvcalError: there is something else at `path`, which is not replaced."""
    check_new_file(path, _are_predictions, "predictions of an evaluation")


def write(path: Path, lines: Iterable[Line], finished: Iterable[Mapping[str, Any]]) -> None:
    """Replace the file: those of `lines`, and of what is there those of other settings that are finished.

    What of it belongs to no finished setting is left out: the results that it stood beside are gone.
    """
    mine: dict[str, list[Line]] = {}
    for line in lines:
        mine.setdefault(key_of(line["setting"]), []).append(line)
    wanted = [key_of(dict(setting)) for setting in finished]
    there: dict[str, list[Line]] = {}
    if path.exists():
        for line in _read(path):
            key = key_of(line["setting"])
            if key in wanted and key not in mine:
                there.setdefault(key, []).append(line)
    elif not mine:
        return
    order = {key: at for at, key in enumerate(wanted)}
    body = []
    for key in sorted({**there, **mine}, key=lambda key: order.get(key, len(order))):
        own = mine.get(key) or there[key]
        tasks = list(dict.fromkeys(line["task"] for line in own))
        body += sorted(own, key=lambda line: (tasks.index(line["task"]), line["index"]))
    write_atomically(path, b"".join(_encode(line) + b"\n" for line in body))


def _encode(line: Line) -> bytes:
    try:
        return json.dumps(line, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return json.dumps(line).encode()


def _read(path: Path) -> list[Line]:
    """Raises KvcalError: no such file."""
    try:
        lines = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
    except (OSError, ValueError, RecursionError) as error:
        raise KvcalError(f"{path}: cannot be read as predictions ({error}): remove it, or choose another") from error
    if not all(isinstance(line, dict) and {"setting", "task", "index", "prediction"} <= set(line) for line in lines):
        raise KvcalError(f"{path}: not predictions of an evaluation: remove it, or choose another")
    return lines


def _are_predictions(path: Path) -> bool:
    try:
        return _read(path) is not None
    except KvcalError:
        return False
