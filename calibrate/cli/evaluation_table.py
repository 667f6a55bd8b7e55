"""An evaluation as a table for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...artifacts.errors import one_line
from .output import print_lines, print_table


def print_results(settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """One line per setting; the first row is our `full`. Many recall columns stand in a table of their own."""
    from ..evaluation.figure import name_of
    from ..evaluation.results import parameters

    full = rows[0]["bytes_per_step"]
    alike = _alike([parameters(row) for row in rows if not row.get("source")])
    names = {
        "method": [name_of(row) for row in rows],
        "settings": [_parameters(parameters(row), alike) for row in rows],
        "ppl": [_number(row.get("perplexity"), ".2f") for row in rows],
        "ratio": [_number(row.get("perplexity_ratio"), ".3f") for row in rows],
    }
    recall = {
        one_line(task).replace("@", "\n@"): [_number((row.get("recall") or {}).get(task), ".2f") for row in rows]
        for task in rows[0]["recall"]
    }
    costs = {
        "error": [_number(_mean(row.get("attention_error")), ".3f") for row in rows],
        "mass": [_number(_mean(row.get("attention_mass")), ".3f") for row in rows],
        "MB": [_number(_millions(row.get("resident_bytes")), ".2f") for row in rows],
        "read/step": [_read(row.get("bytes_per_step"), full) for row in rows],
        "ms": [_number(row.get("ms_per_step"), ".3g") for row in rows],
    }
    if any("hit_rate" in row for row in rows):
        costs["hits"] = [_number(row.get("hit_rate"), ".3f") for row in rows]
    title = f"{settings['model']}: prefix {settings['prefix']}, {settings['continuation']} decoded"
    title = "; ".join([title, *(f"{name} {value}" for name, value in alike.items())])
    for columns in [names | recall | costs] if len(recall) <= 2 else [names | recall, names | costs]:
        print_table(title, list(columns), list(zip(*columns.values(), strict=True)))
    print_lines(
        "ppl: perplexity of the continuation; error: ‖o - o_dense‖ / ‖o_dense‖ of the attention output; mass: of the",
        "dense attention that was read, both means of layers; MB: resident, and read per step, of one row; ms: per",
        f"step of up to {settings['batch_size']} rows"
        + (
            "; of cla, dense is the shared model's own"
            if any(str(row["method"]).startswith("cla") for row in rows)
            else ""
        )
        + ("; hits: of what an offloaded cache read, the share on the device" if "hits" in costs else ""),
    )


def _alike(settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Parameters other than rank and keep that have one value wherever they are: the title states them."""
    values: dict[str, list[Any]] = {}
    for setting in settings:
        for name, value in setting.items():
            if name not in ("method", "rank", "keep") and value not in values.setdefault(name, []):
                values[name].append(value)
    return {name: found[0] for name, found in values.items() if len(found) == 1}


def _parameters(setting: Mapping[str, Any], alike: Mapping[str, Any]) -> str:
    """ "rank .25 keep .125 score": numbers with their names, words without."""
    shown = {name: value for name, value in setting.items() if name != "method" and name not in alike}
    words = ("basis", "stage", "select")
    return " ".join(str(value) if name in words else f"{name} {value}" for name, value in shown.items()).replace(
        " 0.", " ."
    )


def _mean(by_layer: Sequence[float | None] | None) -> float | None:
    known = [value for value in by_layer or [] if value is not None]
    return sum(known) / len(known) if known else None


def _read(count: float | None, full: float) -> str:
    return "–" if count is None else f"{count / 1e6:.2f} ({100 * count / full:.0f} %)"


def _millions(count: float | None) -> float | None:
    return None if count is None else count / 1e6


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"
