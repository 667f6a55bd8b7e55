"""docs/results/gpu.md and its figures. Several runs of one GPU are put together, each GPU has a section."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..shared.page import Figure, Page
from .page_tables import (
    attention_table,
    baseline_table,
    build_table,
    counters_table,
    fastest,
    model_table,
    parts_table,
    selection_table,
    trace_table,
)
from .results import unproven

Results = Mapping[str, Any]
Row = Mapping[str, Any]
LINES = {
    "dense": ("our dense", "C7", "o"),
    "loki": ("Loki", "C0", "o"),
    "clusterkv 80": ("ClusterKV, 80", "C2", "o"),
    "clusterkv 16": ("ClusterKV, 16", "C2", "s"),
    "spectral": ("spectral", "C3", "o"),
    "spectral, rows 8": ("spectral, 8-bit rows", "C3", "s"),
}
TARGETS = (("clusterkv 80", 8, 6.0), ("clusterkv 80", 1, 3.0), ("spectral", 8, 10.0), ("spectral", 1, 4.1))
"""Method, batch, times as fast as the fastest dense step at 131072 tokens."""


def read(folder: Path) -> list[Results]:
    """One for each GPU: {"gpu", "machine": its row, "commits", "rows"}. Of rows asked for twice one that has a time."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("**/*.json")):
        run = json.loads(path.read_text())
        machine = next(row for row in run["rows"] if row["kind"] == "machine")
        gpu = machine.get("gpu", "no GPU")
        runs = found.setdefault(gpu, {"gpu": gpu, "machine": machine, "commits": [], "rows": {}})
        runs["commits"].append(str(run["commit"]))
        for row in run["rows"]:
            asked = tuple(str(row.get(name)) for name in ("kind", "check", "method", "length", "batch", "calibrated"))
            if asked not in runs["rows"] or not ("failed" in row or "skipped" in row):
                runs["rows"][asked] = row
    results = []
    for runs in found.values():
        rows = list(runs["rows"].values())
        checks = [row for row in rows if row["kind"] == "check"]
        marked = [{**row, "unproven": unproven(row, checks)} for row in rows]
        results.append({**runs, "rows": marked, "commits": list(dict.fromkeys(runs["commits"]))})
    return results


def values(results: Path) -> dict[str, Any]:
    return {"sections": [section(found) for found in read(results / "gpu")]}


def figures(results: Path) -> list[Figure]:
    sources = sorted((results / "gpu").glob("**/*.json"))
    found = [one for one in read(results / "gpu") if timed(one)]
    return [Figure(image_of(one), sources, partial(figure, one)) for one in found]


PAGE = Page("gpu.md", Path(__file__).with_name("page.md.j2"), values, figures)


def image_of(results: Results) -> str:
    return f"gpu-{results['gpu'].lower().replace(' ', '-')}.png"


def section(results: Results) -> str:
    machine, rows = results["machine"], results["rows"]
    by_kind = {
        kind: [row for row in rows if row["kind"] == kind] for kind in dict.fromkeys(row["kind"] for row in rows)
    }
    versions = ", ".join(f"{name} {machine.get(name)}" for name in ("driver", "torch", "triton", "transformers"))
    rates = next(iter(by_kind.get("ceilings", [])), {})
    moved = [f"a copy moves {rates['copy']:.0f} GB/s, read and written both counted"] if rates.get("copy") else []
    moved += [f"reading alone {rates['read']:.0f} GB/s"] if rates.get("read") else []
    parts = [
        f"## {results['gpu']}\n",
        f"{versions}; commit {', '.join(results['commits'])}. {verdict(by_kind.get('check', []))}\n",
        f"{'; '.join(moved) or 'The rates of the memory were not measured'}.\n",
        *([f"![attention steps]({image_of(results)})\n"] if timed(results) else ["No attention step was timed.\n"]),
    ]
    attention = by_kind.get("step", []) + by_kind.get("baseline", [])
    for title, kind, table in (
        ("Attention step of one layer, µs", "step", lambda _: attention_table(attention)),
        ("What a step is made of", "parts", lambda parts: parts_table(parts, attention)),
        ("Dense attention by others, µs", "baseline", lambda _: baseline_table(attention)),
        ("A step's kernels, µs", "trace", trace_table),
        ("Selection alone, µs", "selection", selection_table),
        ("Decode step of a whole model, ms", "model", model_table),
        ("Building clusters beside prefill, one layer", "build", build_table),
        ("Hardware counters", "counters", counters_table),
    ):
        if by_kind.get(kind):
            parts += [f"\n### {title}\n", table(by_kind[kind])]
    parts += ["\n### Targets\n", *targets(attention)]
    skipped = [" ".join(str(row[name]) for name in ("kind", "method", "length", "batch") if name in row)
               for row in rows if "skipped" in row]  # fmt: skip
    return "\n".join([*parts, *(["", f"Not measured: {'; '.join(skipped)}."] if skipped else [])]) + "\n"


def verdict(checks: Sequence[Row]) -> str:
    """What the gate said; what rests on a check that is not passed is marked with †."""
    wrong = [
        f"{row['check']} ({row.get('failed') or row.get('skipped') or 'wrong'})"
        for row in checks
        if not row.get("passed")
    ]
    said = f"{len(checks) - len(wrong)} of {len(checks)} checks of the kernels passed."
    return said + (f" Not passed: {', '.join(wrong)}; what rests on them is marked †." if wrong else "")


def targets(attention: Sequence[Row]) -> list[str]:
    """What was aimed at for 131072 tokens, and what came of it."""
    at = {(row["batch"], row["method"]): row for row in attention if row["length"] == 131072}
    lines = []
    for method, batch, least in TARGETS:
        row, dense = at.get((batch, method), {}), fastest(attention, 131072, batch)
        if "us" in row and dense:
            reached, mark = dense["us"] / row["us"], " †" if row["unproven"] else ""
            what = f"{method}, batch {batch}: {reached:.2f}× the fastest dense step ({dense['method']})"
            lines.append(f"- {what}, target {least:g}×.{mark}")
    return lines


def figure(results: Results) -> bytes:
    """Time of an attention step against the tokens held, a panel for the smallest and the largest batch."""
    from kvcal.calibrate.plots import png, two_panels

    drawn, axes = two_panels()
    rows = timed(results)
    batches = sorted({row["batch"] for row in rows})
    for axis, batch in zip(axes, (batches[0], batches[-1]), strict=True):
        lengths = sorted({row["length"] for row in rows if row["batch"] == batch})
        best = [row for length in lengths if (row := fastest(rows, length, batch))]
        axis.plot(*points(best), "k--", label="fastest dense")
        for method, (label, color, marker) in LINES.items():
            mine = [row for row in rows if (row["method"], row["batch"]) == (method, batch) and not row["unproven"]]
            axis.plot(*points(mine), color=color, marker=marker, markersize=4, label=label)
        axis.set(xscale="log", yscale="log", xlabel="tokens held", ylabel="µs per layer and step")
        axis.set_xticks(lengths, [f"{length // 1024}k" for length in lengths])
        axis.minorticks_off()
        axis.set_title(f"batch {batch}", fontsize=10)
        axis.legend(fontsize=8, frameon=False)
    return png(drawn, f"Attention step on {results['gpu']}")


def timed(results: Results) -> list[Row]:
    """Attention steps, ours and others'."""
    return [row for row in results["rows"] if row["kind"] in ("step", "baseline") and "us" in row]


def points(rows: Iterable[Row]) -> tuple[list[int], list[float]]:
    ordered = sorted(rows, key=lambda row: row["length"])
    return [row["length"] for row in ordered], [row["us"] for row in ordered]
