"""The tables of docs/results/gpu.md, each from the rows of one kind. † marks what rests on a check that failed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..shared import tables

Row = Mapping[str, Any]


def table(lines: Sequence[Sequence[str]]) -> str:
    """The first line is the header."""
    return tables.table(lines[0], lines[1:])


def fastest(rows: Iterable[Row], length: int, batch: int) -> Row | None:
    """Of all that read everything and are known to be right, ours included."""
    here = [row for row in rows if (row["length"], row["batch"]) == (length, batch) and "us" in row]
    dense = [row for row in here if reads_all(row) and not row.get("unproven")]
    return min(dense, key=lambda row: row["us"], default=None)


def reads_all(row: Row) -> bool:
    return row["kind"] == "baseline" or row["method"] == "dense"


def attention_table(rows: Sequence[Row]) -> str:
    """Our methods; in brackets how many times faster they are than the fastest dense step, ours included."""
    ours = [row for row in rows if row["kind"] == "step"]
    methods = names(ours)
    lines = [["tokens", "batch", "fastest dense", *methods]]
    for length, batch in places(ours):
        here = {row["method"]: row for row in ours if (row["length"], row["batch"]) == (length, batch)}
        best = fastest(rows, length, batch)
        cells = [f"{best['us']:.1f} ({best['method']})" if best else "–"]
        for method in methods:
            row = here.get(method, {})
            faster = f" ({best['us'] / row['us']:.2f}×)" if best and "us" in row else ""
            cells.append(measured(row) + faster)
        lines.append([str(length), str(batch), *cells])
    return table(lines) + failures(ours)


def parts_table(rows: Sequence[Row], attention: Sequence[Row]) -> str:
    lines = [["tokens", "batch", "method", "step, µs", "MB", "parts, µs", "rest, µs"]]
    for row in rows:
        if "parts" not in row:
            continue
        step = next((other for other in attention if alike(row, other) and other["method"] == row["method"]), {})
        parts = ", ".join(f"{name} {part(of)}" for name, of in row["parts"].items())
        times = [of.get("us") for of in row["parts"].values()]
        rest = f"{step['us'] - sum(times):.1f}" if "us" in step and None not in times else "–"
        whole = f"{measured(step)} ({step['expected_us']:.1f})" if "us" in step else "–"
        moved = f"{step['bytes'] / 1e6:.1f}" if "bytes" in step else "–"
        lines.append([str(row["length"]), str(row["batch"]), row["method"], whole, moved, parts, rest])
    return table(lines) + failures(rows)


def part(of: Row) -> str:
    if "us" not in of:
        return "–"
    rate = f", {of['bytes'] / of['us'] / 1000:.0f} GB/s" if of.get("bytes") else ""
    return f"{of['us']:.1f} ({of['expected_us']:.1f}{rate})"


def baseline_table(rows: Sequence[Row]) -> str:
    others = [row for row in rows if reads_all(row)]
    timed = names(row for row in others if "us" in row)
    lines = [["tokens", "batch", "expected", *timed]]
    for length, batch in places(others):
        here = {row["method"]: row for row in others if (row["length"], row["batch"]) == (length, batch)}
        expected = next((f"{row['expected_us']:.1f}" for row in here.values() if "expected_us" in row), "–")
        lines.append([str(length), str(batch), expected, *(measured(here.get(name, {})) for name in timed)])
    return table(lines) + failures(row for row in others if row["kind"] == "baseline")


def trace_table(rows: Sequence[Row]) -> str:
    lines = [["tokens", "batch", "method", "step, µs", "launches", "kernels: times, µs, and gap before them"]]
    for row in rows:
        if "kernels" not in row:
            continue
        kernels = [f"{of['n']:g} × {of['us']:.1f} + {of['gap']:.1f} `{name}`" for name, of in row["kernels"].items()]
        place = [str(row["length"]), str(row["batch"]), row["method"]]
        lines.append([*place, measured(row), f"{row['launches']:g} ({row['launches_expected']})", "; ".join(kernels)])
    return table(lines) + failures(rows)


def selection_table(rows: Sequence[Row]) -> str:
    methods = names(rows)
    lines = [["tokens", "batch", *methods]]
    for length, batch in places(rows):
        here = {row["method"]: row for row in rows if (row["length"], row["batch"]) == (length, batch)}
        lines.append([str(length), str(batch), *(measured(here.get(method, {})) for method in methods)])
    return table(lines) + failures(rows)


def model_table(rows: Sequence[Row]) -> str:
    lines = [["tokens", "batch", "method", "ms", "expected", "tokens/s", "× full", "cache, GB"]]
    for row in (row for row in rows if "skipped" not in row):
        full = next((other for other in rows if alike(row, other) and other["method"] == "full"), {})
        cells = ["–"] * 5
        if "ms" in row:
            mark = (" †" if row.get("unproven") else "") + (" (not captured)" if row["why_not_captured"] else "")
            times = f"{full['ms'] / row['ms']:.2f}" if "ms" in full else "–"
            expected = f"{row['expected_us'] / 1000:.2f}"
            cells = [f"{row['ms']:.2f}{mark}", expected, f"{row['tokens_per_s']:.0f}", times]
            cells += [f"{row['cache_bytes'] / 1e9:.1f}"]
        lines.append([str(row["length"]), str(row["batch"]), row["method"], *cells])
    reasons = {row["why_not_captured"] for row in rows if row.get("why_not_captured")}
    return table(lines) + "".join(f"\n\nNot captured: {reason}." for reason in sorted(reasons)) + failures(rows)


def build_table(rows: Sequence[Row]) -> str:
    lines = [["tokens", "per cluster", "begun with", "passes", "clusters, ms", "expected", "prefill, ms", "ratio"]]
    for row in (row for row in rows if "skipped" not in row):
        start = "given centroids" if row["calibrated"] else "k-means++"
        expected = f"{row['expected_us'] / 1000:.1f}" if "expected_us" in row else "–"
        built, prefill, ratio = (
            f"{row[name]:.2f}" if name in row else "–" for name in ("build_ms", "prefill_ms", "ratio")
        )
        built += " †" if row.get("unproven") else ""
        cells = [str(row.get("per_cluster", "–")), start, str(row.get("passes", "–")), built, expected, prefill, ratio]
        lines.append([str(row["length"]), *cells])
    return table(lines) + failures(rows)


def counters_table(rows: Sequence[Row]) -> str:
    counted = [row for row in rows if row.get("counters")]
    metrics = list(dict.fromkeys(name for row in counted for of in row["counters"] for name in of if name != "kernel"))
    lines = [["method", "batch", "kernel", *metrics]]
    lines += [
        [row["method"], str(row["batch"]), f"`{of['kernel']}`", *(of.get(metric, "–") for metric in metrics)]
        for row in counted
        for of in row["counters"]
    ]
    return (table(lines) if counted else "None were read.") + failures(rows)


def measured(row: Row) -> str:
    return (f"{row['us']:.1f}" if "us" in row else "–") + (" †" if row.get("unproven") else "")


def names(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in rows))


def places(rows: Iterable[Row]) -> list[tuple[int, int]]:
    return sorted({(row["length"], row["batch"]) for row in rows})


def alike(row: Row, other: Row) -> bool:
    return (row["length"], row["batch"]) == (other["length"], other["batch"])


def failures(rows: Iterable[Row]) -> str:
    """Why some rows have no time, each reason once."""
    reasons = dict.fromkeys(f"{row.get('method', 'clusters')}: {row['failed']}" for row in rows if "failed" in row)
    return "\n\nWithout a time:\n" + "\n".join(f"- {reason}" for reason in reasons) if reasons else ""
