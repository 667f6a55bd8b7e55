"""docs/results/cpu.md, from what `cpu.py` measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ABOUT = """`full` and `spectral` are kernels in numba (`kernels/dense`, `kernels/scan`). Settings of `spectral` are
those whose quality [real.md](real.md) has: its defaults, and a sixteenth of the bytes after 7680 tokens of
SmolLM2-135M. What stands in one column was measured in turns, in one run. Medians, in brackets the quartiles."""
OF_LAYERS = """Random keys and values, one sequence. Milliseconds by tokens held; times as fast as the fastest of
torch's three usual ways (SDPA with `enable_gqa`, with repeated heads, matrix products), and as the fastest of all
four: a group's queries as rows of one product is what `full` does without numba."""
OF_MODELS = """Milliseconds by tokens held, text of the standard library; times as fast as transformers with its own
cache and SDPA."""
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
        lines += [
            f"## An attention step of one layer, {shape}",
            "",
            OF_LAYERS,
            "",
            *header(lengths),
        ]
        for name in next(iter(lengths.values()))["ms"]:
            cells = [cell(measured["ms"], name) for measured in lengths.values()]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        read = [
            ", ".join(
                f"{name} {100 * count / measured['bytes_read']['full']:.1f} %" for name, count in others(measured)
            )
            for measured in lengths.values()
        ]
        lines += ["", "Bytes read, of those of `full`: " + "; ".join(read) + ".", ""]
    return lines


def others(measured: Mapping[str, Any]) -> list[tuple[str, int]]:
    return [(name, count) for name, count in measured["bytes_read"].items() if name != "full"]


def cell(ms: Mapping[str, Sequence[float]], name: str) -> str:
    low, median, high = ms[name]
    text = f"{median:.2f} [{low:.2f}, {high:.2f}]"
    if name in TORCH:
        return text
    usual, all_four = (min(ms[known][1] for known in some) for some in (TORCH[:3], TORCH))
    return f"{text}: **{usual / median:.1f}×**, {all_four / median:.1f}×"


def header(lengths: Mapping[str, Any]) -> list[str]:
    return ["| | " + " | ".join(f"{int(length):,}" for length in lengths) + " |", "| --- |" + " --- |" * len(lengths)]


def models(found: Mapping[str, Any]) -> list[str]:
    lines = []
    for model, lengths in found.get("model", {}).items():
        lines += [
            f"## A decoded token of {model}",
            "",
            OF_MODELS,
            "",
            *header(lengths),
        ]
        for name in next(iter(lengths.values()))["ms"]:
            cells = []
            for measured in lengths.values():
                low, median, high = measured["ms"][name]
                cells.append(f"{median:.1f} [{low:.1f}, {high:.1f}]: {measured['ms'][STOCK][1] / median:.2f}×")
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        held = [
            ", ".join(f"{name} {count / 2**20:.1f}" for name, count in measured["resident_bytes"].items())
            for measured in lengths.values()
        ]
        lines += ["", "MiB that caches hold: " + "; ".join(held) + ".", ""]
    return lines
