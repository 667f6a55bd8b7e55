"""docs/results/cpu.md, from what `cpu.py` measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

ABOUT = """`full` and `spectral` are kernels in numba (`kernels/dense`, `kernels/scan`). Settings of `spectral` are
those whose quality [real.md](real.md) has: its defaults, and a sixteenth of the bytes after 7680 tokens of
SmolLM2-135M. Of Gemma-3-270m after 16384 tokens it has 8-bit rows with keep .045, and neither of these.
What stands in one column was measured in turns, in one run. Medians, in brackets the quartiles."""
OF_LAYERS = """Random keys and values, one sequence. Milliseconds by tokens held; times as fast as the fastest of
torch's three usual ways (SDPA with `enable_gqa`, with repeated heads, matrix products), and as the fastest of all
four: a group's queries as rows of one product is what `full` does without numba."""
OF_MODELS = """Milliseconds by tokens held, text of the standard library; times as fast as transformers with its own
cache and SDPA, and as our `full`. Below, where it was measured, seconds from an empty cache to the first decoded token,
the prompt included."""
TORCH = ("SDPA, enable_gqa", "SDPA, repeated heads", "matmul", "SDPA, a group's queries as rows")
"""What `attention` measures of torch."""
STOCK = "transformers"


def write(path: Path, found: Mapping[str, Any]) -> None:
    path.write_text("\n".join([*about(found), *attention(found), *models(found)]))


def about(found: Mapping[str, Any]) -> list[str]:
    machine = found["machine"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "numba", "transformers"))
    return [
        "# Decoding on a CPU",
        "",
        f"{machine['cpu']}, {machine['torch_threads']} threads, {versions}. Made by `python benchmarks/cpu.py`.",
        "",
        ABOUT,
        "",
    ]


def attention(found: Mapping[str, Any]) -> list[str]:
    lines = []
    for shape, lengths in found.get("attention", {}).items():
        first = next(iter(lengths.values()))
        rows = {name: partial(step_cell, name) for name in first["ms"]}
        rows |= {f"bytes of {name}, of `full`'s": partial(bytes_cell, name) for name in first["bytes_read"]}
        lines += [f"## An attention step of one layer, {shape}", "", OF_LAYERS, "", *table(lengths, rows), ""]
    return lines


def step_cell(name: str, measured: Mapping[str, Any]) -> str:
    low, median, high = measured["ms"][name]
    text = f"{median:.2f} [{low:.2f}, {high:.2f}]"
    if name in TORCH:
        return text
    usual, all_four = (min(measured["ms"][known][1] for known in some) for some in (TORCH[:3], TORCH))
    return f"{text}: **{usual / median:.1f}×**, {all_four / median:.1f}×"


def bytes_cell(name: str, measured: Mapping[str, Any]) -> str:
    return f"{100 * measured['bytes_read'][name] / measured['bytes_read']['full']:.1f} %"


def models(found: Mapping[str, Any]) -> list[str]:
    lines = []
    for model, lengths in found.get("model", {}).items():
        rows = {name: partial(token_cell, name) for name in names(lengths, "ms")}
        rows |= {f"first token, {name}": partial(first_cell, name) for name in names(lengths, "first_ms")}
        rows |= {f"MiB that {name} holds": partial(held_cell, name) for name in names(lengths, "resident_bytes")}
        lines += [f"## A decoded token of {model}", "", OF_MODELS, "", *table(lengths, rows), ""]
    return lines


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


def table(lengths: Mapping[str, Any], rows: Mapping[str, Callable[[Mapping[str, Any]], str]]) -> list[str]:
    """Columns by tokens held; a row's function gives a cell from what was measured at that length."""
    head = "| | " + " | ".join(f"{int(length):,}" for length in lengths) + " |"
    body = [f"| {name} | " + " | ".join(cell(part) for part in lengths.values()) + " |" for name, cell in rows.items()]
    return [head, "| --- |" + " --- |" * len(lengths), *body]
