"""docs/results/cpu.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..shared.lookup import load
from ..shared.page import Page
from ..shared.tables import table

TORCH = ("SDPA, enable_gqa", "SDPA, repeated heads", "matmul", "SDPA, a group's queries as rows")
"""What `attention` measures of torch."""
STOCK = "transformers"


def values(results: Path) -> dict[str, Any]:
    found = load(results / "cpu" / "decoding.json")
    return {
        "machine": found["machine"],
        "attention": {shape: of_layer(lengths) for shape, lengths in found.get("attention", {}).items()},
        "models": {model: of_model(lengths) for model, lengths in found.get("model", {}).items()},
    }


PAGE = Page("cpu.md", Path(__file__).with_name("page.md.j2"), values)


def of_layer(lengths: Mapping[str, Any]) -> str:
    first = next(iter(lengths.values()))
    rows = {name: partial(step_cell, name) for name in first["ms"]}
    rows |= {f"bytes of {name}, of `full`'s": partial(bytes_cell, name) for name in first["bytes_read"]}
    return by_length(lengths, rows)


def of_model(lengths: Mapping[str, Any]) -> str:
    rows = {name: partial(token_cell, name) for name in names(lengths, "ms")}
    rows |= {f"first token, {name}": partial(first_cell, name) for name in names(lengths, "first_ms")}
    rows |= {f"MiB that {name} holds": partial(held_cell, name) for name in names(lengths, "resident_bytes")}
    return by_length(lengths, rows)


def step_cell(name: str, measured: Mapping[str, Any]) -> str:
    low, median, high = measured["ms"][name]
    text = f"{median:.2f} [{low:.2f}, {high:.2f}]"
    if name in TORCH:
        return text
    usual, all_four = (min(measured["ms"][known][1] for known in some) for some in (TORCH[:3], TORCH))
    return f"{text}: **{usual / median:.1f}×**, {all_four / median:.1f}×"


def bytes_cell(name: str, measured: Mapping[str, Any]) -> str:
    return f"{100 * measured['bytes_read'][name] / measured['bytes_read']['full']:.1f} %"


def names(lengths: Mapping[str, Any], part: str) -> list[str]:
    """What was measured of this part at any length."""
    return list(dict.fromkeys(name for measured in lengths.values() for name in measured.get(part, ())))


def token_cell(name: str, measured: Mapping[str, Any]) -> str:
    low, median, high = measured["ms"][name]
    stock, full = (measured["ms"][known][1] / median for known in (STOCK, "full"))
    return f"{median:.1f} [{low:.1f}, {high:.1f}]: **{stock:.2f}×**, {full:.2f}×"


def first_cell(name: str, measured: Mapping[str, Any]) -> str:
    if name not in measured.get("first_ms", ()):
        return ""
    low, median, high = (number / 1000 for number in measured["first_ms"][name])
    return f"{median:.2f} [{low:.2f}, {high:.2f}]"


def held_cell(name: str, measured: Mapping[str, Any]) -> str:
    return f"{measured['resident_bytes'][name] / 2**20:.1f}" if name in measured["resident_bytes"] else ""


def by_length(lengths: Mapping[str, Any], rows: Mapping[str, Callable[[Mapping[str, Any]], str]]) -> str:
    """Columns by tokens held; a row's function gives a cell from what was measured at that length."""
    head = ["", *(f"{int(length):,}" for length in lengths)]
    return table(head, [[name, *(cell(part) for part in lengths.values())] for name, cell in rows.items()])
