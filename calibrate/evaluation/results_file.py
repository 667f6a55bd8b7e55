"""Reading results files: whether they are valid, and whether two of them evaluate the same."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...artifacts import KvcalError
from ...artifacts.missing import check_exists
from .grid import Setting
from .measurements import Measured
from .rows import MEASURED, compared

SAME = ("weights_sha256", "tokens_sha256", "dtype", "batch_size", "question")
"""Settings that must agree for rows of two files to stand in one table."""


def are_results(path: Path) -> bool:
    """Whether a file holds results of whatever settings."""
    try:
        read(path)
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
        full: our row of `full`, for what is relative to it.

    Raises:
        KvcalError: not a results file, or of another model or other tokens.
    """
    path = Path(path)
    body = read_current(path)
    for name in SAME:
        there, ours = body["settings"].get(name), settings.get(name)
        if there != ours:
            kinds = {"weights_sha256": "another model", "tokens_sha256": "other tokens"}
            kinds["question"] = "questions asked otherwise"
            what = kinds.get(name, f"another {name.replace('_', ' ')}")
            raise KvcalError(
                f"{path}: was evaluated on {what} ({name} {short(there)} there, {short(ours)} here): "
                "run both with the same model, data, prefix, continuation, windows, tasks, lengths, episodes and seed"
            )
    rows = []
    for row in body["results"]:
        row = {"source": path.stem, **row}
        stated = {name: value for name, value in row.items() if value not in (None, {})}
        row |= {**compared(row, full), **stated}
        if row["perplexity_ratio"] is None and row.get("perplexity") and full.get("perplexity"):
            row["perplexity_ratio"] = row["perplexity"] / full["perplexity"]
        rows.append(row)
    return rows


def read_current(path: Path) -> dict[str, Any]:
    """Raises KvcalError: no results file, or one of a version whose tasks were scored otherwise."""
    body = read(path)
    raw = [batch for batches in body.get("partial", {}).values() for batch in batches.values()]
    if any("recall" in row for row in body["results"]) or not all(batch.keys() == _RAW for batch in raw):
        raise KvcalError(
            f"{path}: holds results of an earlier kvcal, whose answers were scored otherwise: choose another --output, "
            "or remove it, and evaluate again"
        )
    return body


def read(path: Path) -> dict[str, Any]:
    check_exists(path)
    try:
        if not path.is_file():
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
        good = good and all(isinstance(raw, dict) for entry in partial.values() for raw in entry.values())
        # `method`: a name, or the settings of every layer.
        good &= all(isinstance(row, dict) and isinstance(row.get("method"), (str, list)) for row in body["results"])
        good = good and all(map(_has_numbers, body["results"]))
    if not good:
        raise KvcalError(f"{path}: not a results file (no settings and results): choose another")
    return body


def _has_numbers(row: Mapping[str, Any]) -> bool:
    """Whether all that tables and figures show of a row has the type that they need; None, of what was not
    measured, has it."""
    for name in MEASURED:
        value = row.get(name)
        if value is None:
            continue
        if name == "source":
            good = isinstance(value, str)
        elif name in _BY_TASK_AND_MORE:
            good = isinstance(value, dict) and all(map(_are_numbers, value.values()))
        elif name in _BY_TASK:
            good = isinstance(value, dict) and _are_numbers(value)
        elif name in _LISTS:
            good = isinstance(value, list) and _are_numbers(value)
        else:
            good = _is_number(value) and (name != "bytes_per_step" or value > 0)
        if not good:
            return False
    return True


_RAW = {field.name for field in dataclasses.fields(Measured)}
_LISTS = ("attention_error", "attention_mass", "window_nll")
_BY_TASK = ("scores", "scores_se", "relative", "relative_se")
_BY_TASK_AND_MORE = ("sample_scores", "scores_by_depth")


def _are_numbers(values: Any) -> bool:
    """Whether a list, or the values of a mapping, are numbers; None stands for a missing one."""
    found = values.values() if isinstance(values, dict) else values
    return isinstance(values, (dict, list)) and all(value is None or _is_number(value) for value in found)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and not abs(value) > 1e300


def differences(there: Mapping[str, Any], asked: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(name, there, asked), first in our own order, nested mappings opened."""
    found = []
    for name in [*asked, *(name for name in there if name not in asked)]:
        a, b = there.get(name), asked.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += [(f"{name}.{inner}", x, y) for inner, x, y in differences(a, b)]
        elif a != b:
            found.append((name, a, b))
    return found


def short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 40 else text[:37] + "…"
