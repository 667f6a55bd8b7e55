"""What every sample was answered, as JSONL beside the results: a line for each setting, task and sample.

{"setting": {…}, "task": "passkey@1024", "index": 3, "question": "… The code is", "prediction": " 12345",
 "answers": ["12345"], "score": 1.0, "depth": 0.7}

"question" is the end of what was asked; files of an earlier kvcal lack it.
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
    """Replace the file by `lines`, and by those of its own lines that are of other settings in `finished`.

    Lines of settings that are not in `finished` are dropped: the results that they belonged to are gone.
    """
    new: dict[str, list[Line]] = {}
    for line in lines:
        new.setdefault(key_of(line["setting"]), []).append(line)
    wanted = [key_of(dict(setting)) for setting in finished]
    old: dict[str, list[Line]] = {}
    if path.exists():
        for line in read(path):
            key = key_of(line["setting"])
            if key in wanted and key not in new:
                old.setdefault(key, []).append(line)
    elif not new:
        return
    order = {key: number for number, key in enumerate(wanted)}
    body = []
    for key in sorted({**old, **new}, key=lambda key: order.get(key, len(order))):
        of_setting = new.get(key) or old[key]
        tasks = list(dict.fromkeys(line["task"] for line in of_setting))
        body += sorted(of_setting, key=lambda line: (tasks.index(line["task"]), line["index"]))
    write_atomically(path, b"".join(_encode(line) + b"\n" for line in body))


def _encode(line: Line) -> bytes:
    try:
        return json.dumps(line, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return json.dumps(line).encode()


def read(path: Path) -> list[Line]:
    """Raises KvcalError: not a file of predictions."""
    try:
        lines = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
    except (OSError, ValueError, RecursionError) as error:
        raise KvcalError(f"{path}: cannot be read as predictions ({error}): remove it, or choose another") from error
    if not all(isinstance(line, dict) and {"setting", "task", "index", "prediction"} <= set(line) for line in lines):
        raise KvcalError(f"{path}: not predictions of an evaluation: remove it, or choose another")
    return lines


def _are_predictions(path: Path) -> bool:
    try:
        return read(path) is not None
    except KvcalError:
        return False
