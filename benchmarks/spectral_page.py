"""docs/results/spectral.md and spectral.png, from what benchmarks/spectral.py measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvcal.calibrate.evaluation.figure import evaluation_figure, mean_recall
from kvcal.calibrate.evaluation.results import parameters

Row = dict[str, Any]
SLACK = 1.02
"""A row counts at a level when it reads at most so much of it."""
PLAN = "spectral, planned"


def write_page(folder: Path, levels: Mapping[str, float], ablation: Mapping[str, Mapping[str, Any]]) -> None:
    body = json.loads((folder / "spectral.json").read_text())
    plans, (full, *rows) = body["settings"]["plans"], body["results"]
    for row in rows:
        row["bytes"] = row["bytes_per_step"] / full["bytes_per_step"]
        row["error"] = sum(row["attention_error"]) / len(row["attention_error"])
        row["found"] = mean_recall(row)
    names = {json.dumps(plan["layers"], sort_keys=True): name for name, plan in plans.items()}
    planned = {}
    for row in rows:
        name = names.get(json.dumps(row["method"], sort_keys=True))
        if name:
            planned[name] = row
            row["method"] = PLAN
    ablated = {name: find(rows, setting) for name, setting in ablation.items()}
    others = [row for row in rows if row["method"] not in (PLAN, "spectral")]
    uniform = [row for row in rows if row["method"] == "spectral"]
    sections = [
        (folder / "spectral-head.md").read_text().rstrip(),
        "## At equal bytes\n\n" + LEVELS + table(by_level(levels, planned, uniform, others)),
        "## Cells that another method wins\n\n" + lost(levels, planned, uniform, others),
        "## What the planner is worth\n\n" + PLANNER + table(plan_rows(levels, planned, plans, uniform)),
        "## One thing changed at a time\n\n" + ABLATION + table(ablation_rows(ablated)),
        "## The plans\n\n" + "\n\n".join(settings_of(name, plan) for name, plan in plans.items()),
        "## Every row\n\n" + table(all_rows(rows)),
        "![quality against bytes](spectral.png)",
    ]
    (folder / "spectral.md").write_text("\n\n".join(sections) + "\n")
    drawn = [{key: value for key, value in row.items() if key not in ADDED} for row in [full, *rows]]
    (folder / "spectral.png").write_bytes(evaluation_figure({**body["settings"], "prefix": 1024}, drawn))


ADDED = ("bytes", "error", "found")
METRICS: dict[str, tuple[str, Callable[[Row], float]]] = {
    "perplexity / full": ("perplexity_ratio", lambda row: row["perplexity_ratio"]),
    "recall": ("found", lambda row: -row["found"]),
    "error": ("error", lambda row: row["error"]),
}
"""Each with what is less where it is better."""


def find(rows: Sequence[Row], setting: Mapping[str, Any]) -> Row:
    return next(row for row in rows if all(row.get(name) == value for name, value in setting.items()))


def within(rows: Sequence[Row], level: float) -> list[Row]:
    return [row for row in rows if row["bytes"] <= level * SLACK]


def best_of(rows: Sequence[Row], badness: Callable[[Row], float]) -> Row | None:
    return min(rows, key=badness, default=None)


def by_level(
    levels: Mapping[str, float], planned: Mapping[str, Row], uniform: Sequence[Row], others: Sequence[Row]
) -> list[list[str]]:
    lines = [["bytes", "method", *METRICS]]
    methods = list(dict.fromkeys(row["method"] for row in others))
    for name, level in levels.items():
        row = planned[name]
        lines.append([name, PLAN, *(f"{row[key]:.3f}" for key, _ in METRICS.values())])
        groups = {"spectral, uniform": uniform} | {m: [row for row in others if row["method"] == m] for m in methods}
        for method, of_method in groups.items():
            best = [(key, best_of(within(of_method, level), badness)) for key, badness in METRICS.values()]
            lines.append(["", method, *("–" if found is None else f"{found[key]:.3f}" for key, found in best)])
    return lines


def lost(levels: Mapping[str, float], planned: Mapping[str, Row], uniform: Sequence[Row], others: Sequence[Row]) -> str:
    lines = []
    for name, level in levels.items():
        ours = [planned[name], *within(uniform, level)]
        for metric, (key, badness) in METRICS.items():
            rival = best_of(within(others, level), badness)
            for kind, of_kind in (("planned", ours[:1]), ("uniform", ours[1:])):
                best = best_of(of_kind, badness)
                if rival and best and badness(rival) < badness(best):
                    theirs = (
                        f"{rival['method']} {rival[key]:.4f} ({describe(rival)}; {rival['bytes']:.4f} of the bytes)"
                    )
                    mine = f"spectral {kind} {best[key]:.4f} ({best['bytes']:.4f})"
                    lines.append(f"- {name}, {metric}: {theirs}, {mine}")
    return "\n".join(lines) or "None."


def plan_rows(
    levels: Mapping[str, float],
    planned: Mapping[str, Row],
    plans: Mapping[str, Mapping[str, Any]],
    uniform: Sequence[Row],
) -> list[list[str]]:
    lines = [
        ["budget", "", "bytes", "perplexity / full", *next(iter(planned.values()))["recall"], "error", "predicted"]
    ]
    for name, level in levels.items():
        predicted = plans[name]["predicted"]["attention_error"]
        lines.append([name, "planned", *cells(planned[name]), f"{predicted:.3f}"])
        best = best_of(within(uniform, level), lambda row: row["perplexity_ratio"])
        if best is not None:
            lines.append(["", f"uniform: {describe(best)}", *cells(best), ""])
    return lines


def ablation_rows(ablated: Mapping[str, Row]) -> list[list[str]]:
    first = next(iter(ablated.values()))
    header = ["", "bytes", "perplexity / full", *first["recall"], "error"]
    return [header, *([name, *cells(row)] for name, row in ablated.items())]


def all_rows(rows: Sequence[Row]) -> list[list[str]]:
    header = ["method", "settings", "bytes", "perplexity / full", *rows[0]["recall"], "error", "resident"]
    ordered = sorted(rows, key=lambda row: (row["method"], row["bytes"]))
    return [
        header,
        *([row["method"], describe(row), *cells(row), f"{row['resident_bytes'] / 1e6:.2f} MB"] for row in ordered),
    ]


def cells(row: Row) -> list[str]:
    recall = [f"{value:.2f}" for value in row["recall"].values()]
    return [f"{row['bytes']:.4f}", f"{row['perplexity_ratio']:.4f}", *recall, f"{row['error']:.3f}"]


def describe(row: Row) -> str:
    own = {name: value for name, value in parameters(row).items() if name not in ("method", *ADDED)}
    return " ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in own.items()
    )


def settings_of(name: str, plan: Mapping[str, Any]) -> str:
    lines = [["layer", "settings"]]
    for layer, setting in enumerate(plan["layers"]):
        lines.append([str(layer), describe({**setting, "method": ""}) if setting["method"] != "full" else "dense"])
    return f"{name}:\n\n{table(lines)}"


def table(lines: Sequence[Sequence[str]]) -> str:
    header, *rows = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows])


LEVELS = """For each budget (bytes read per step over dense attention's; codes, scales, maps, rows and tail count) the
plan made for it, and of every other method the best row within it, by each column on its own: a method's three cells
may come from three settings.

"""
PLANNER = """The plan for a budget, and the uniform settings of lowest perplexity within it. predicted: the attention
error that the planner expected, from other text and questions.

"""
ABLATION = """Around rank 32, 2 bits, a thirty-second of the tokens read exactly, every code read, clusters of 80.

"""
