"""The tables of docs/results/gpu.md, each from the rows of one section of the JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def table(rows: Sequence[Sequence[str]]) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def attention_table(rows: Sequence[Row]) -> str:
    """Our methods; in brackets how many times faster they are than the fastest dense step, ours included."""
    methods = list(dict.fromkeys(row["method"] for row in rows if row["ours"]))
    lines = [["tokens", "batch", "fastest dense", *methods]]
    for length, batch in places(rows):
        here = {row["method"]: row for row in rows if (row["length"], row["batch"]) == (length, batch)}
        dense = [row for row in here.values() if row["dense"] and "us" in row]
        best = min(dense, key=lambda row: row["us"], default=None)
        cells = [f"{best['us']:.1f} ({best['method']})" if best else "–"]
        for method in methods:
            row = here.get(method, {})
            if "us" not in row:
                cells.append("–")
            else:
                cells.append(f"{row['us']:.1f}" + (f" ({best['us'] / row['us']:.2f}×)" if best else ""))
        lines.append([str(length), str(batch), *cells])
    return table(lines) + failures(row for row in rows if row["ours"])


def parts_table(rows: Sequence[Row]) -> str:
    lines = [["batch", "method", "step, µs", "MB", "of copy", "of read", "parts, µs", "rest, µs"]]
    length = max((row["length"] for row in rows if row["length"] <= 131072), default=0)
    for row in sorted((row for row in rows if row["length"] == length), key=lambda row: row["batch"]):
        if not row["ours"] or "us" not in row:
            continue
        parts = [
            f"{name} {part['us']:.1f}" + (f" ({part['of_copy']:.0%})" if "of_copy" in part else "")
            for name, part in row["parts"].items()
        ]
        shares = [f"{row[name]:.0%}" for name in ("of_copy", "of_read")]
        moved = f"{row['bytes'] / 1e6:.1f}"
        lines.append(
            [
                str(row["batch"]),
                row["method"],
                f"{row['us']:.1f}",
                moved,
                *shares,
                ", ".join(parts),
                f"{row['rest_us']:.1f}",
            ]
        )
    return table(lines)


def baseline_table(rows: Sequence[Row]) -> str:
    others = [row for row in rows if row["dense"]]
    timed = list(dict.fromkeys(row["method"] for row in others if "us" in row))
    lines = [["tokens", "batch", *timed]]
    for length, batch in places(rows):
        here = {row["method"]: row for row in others if (row["length"], row["batch"]) == (length, batch)}
        cells = [f"{here[name]['us']:.1f}" if "us" in here.get(name, {}) else "–" for name in timed]
        lines.append([str(length), str(batch), *cells])
    return table(lines) + failures(row for row in others if not row["ours"])


def selection_table(rows: Sequence[Row]) -> str:
    ways = ("select", "select_threshold", "topk")
    lines = [["tokens", "batch", "chosen", "select", "select_threshold", "torch.topk"]]
    for row in rows:
        cells = [f"{row[way]['us']:.1f}" if "us" in row[way] else "–" for way in ways]
        lines.append([str(row["length"]), str(row["batch"]), str(row["keep"]), *cells])
    return table(lines)


def model_table(rows: Sequence[Row]) -> str:
    lines = [["tokens", "batch", "method", "ms", "tokens/s", "× full", "cache, GB"]]
    for row in rows:
        full = next((other for other in rows if alike(row, other) and other["method"] == "full"), {})
        cells = ["–"] * 4
        if "ms" in row:
            times = f"{full['ms'] / row['ms']:.2f}" if "ms" in full else "–"
            mark = "" if row["why_not_captured"] is None else " (not captured)"
            cells = [f"{row['ms']:.2f}{mark}", f"{row['tokens_per_s']:.0f}", times, f"{row['cache_bytes'] / 1e9:.1f}"]
        lines.append([str(row["length"]), str(row["batch"]), row["method"], *cells])
    reasons = {row["why_not_captured"] for row in rows if row.get("why_not_captured")}
    return table(lines) + "".join(f"\n\nNot captured: {reason}." for reason in sorted(reasons)) + failures(rows)


def build_table(rows: Sequence[Row]) -> str:
    lines = [["tokens", "per cluster", "begun with", "passes", "clusters, ms", "prefill, ms", "ratio"]]
    for row in rows:
        start = "given centroids" if row["calibrated"] else "k-means++"
        times = [f"{row[name]:.2f}" if name in row else "–" for name in ("build_ms", "prefill_ms", "ratio")]
        lines.append([str(row["length"]), str(row["per_cluster"]), start, str(row.get("passes", "–")), *times])
    return table(lines)


def places(rows: Sequence[Row]) -> list[tuple[int, int]]:
    return sorted({(row["length"], row["batch"]) for row in rows})


def alike(row: Row, other: Row) -> bool:
    return (row["length"], row["batch"]) == (other["length"], other["batch"])


def failures(rows: Any) -> str:
    """Why some rows have no time, each reason once."""
    reasons = dict.fromkeys(f"{row['method']}: {row['failed']}" for row in rows if "failed" in row)
    return "\n\nWithout a time:\n" + "\n".join(f"- {reason}" for reason in reasons) if reasons else ""
