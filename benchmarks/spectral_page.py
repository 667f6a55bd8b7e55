"""docs/results/spectral.md and spectral.png, from what benchmarks/spectral.py measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvcal.calibrate.evaluation.figure import evaluation_figure, pareto_front
from kvcal.calibrate.evaluation.results_file import parameters
from kvcal.calibrate.evaluation.rows import MEASURED, mean_score

Row = dict[str, Any]
SLACK = 1.06
"""A row counts at a level when it reads at most so much of it: methods that keep so many tokens read a little more."""
PLAN = "spectral, planned"
BATCH, DIMS, CODEWORDS, TOKENS = 8, 64, 64, 1024 + 64
"""Rows that are decoded together, the head dim, codewords of a KV head, and tokens of a row in the middle of its
continuation."""


def write_page(
    folder: Path, levels: Mapping[str, float], ablation: Mapping[str, Mapping[str, Any]], asked: Sequence[Row]
) -> None:
    """
    Args:
        asked: the settings beside plans; what was measured of others is left out.
    """
    body = json.loads((folder / "spectral.json").read_text())
    plans, (full, *rows) = body["settings"]["plans"], body["results"]
    rows = [row for row in rows if not isinstance(row["method"], str) or parameters(row) in asked]
    for row in rows:
        row["bytes"] = row["bytes_per_step"] / full["bytes_per_step"]
        row["error"] = sum(row["attention_error"]) / len(row["attention_error"])
        row["found"] = mean_score(row)[0]
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
        HEAD,
        "## At equal bytes\n\n" + LEVELS + table(by_level(levels, planned, uniform, others)),
        "## Cells that another method wins\n\n" + lost(levels, planned, uniform, others),
        "## What the planner is worth\n\n" + PLANNER + table(plan_rows(levels, planned, plans, uniform)),
        "## One thing changed at a time\n\n" + ABLATION + table(ablation_rows(ablated)),
        "## The plans\n\n" + "\n\n".join(settings_of(name, plan) for name, plan in plans.items()),
        "## Every row\n\n" + table(all_rows(rows)),
        "![quality against bytes](spectral.png)",
    ]
    (folder / "spectral.md").write_text("\n\n".join(sections) + "\n")
    drawn = [full, *(row for method in dict.fromkeys(row["method"] for row in rows) for row in front(rows, method))]
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


def front(rows: Sequence[Row], method: str) -> list[Row]:
    """Of a method's rows those that no other of its rows beats in perplexity and bytes, without their settings."""
    of_method = [row for row in rows if row["method"] == method]
    points = [(row["bytes"], row["perplexity_ratio"]) for row in of_method]
    kept = [of_method[index] for index in pareto_front(points)]
    return [{key: row[key] for key in ("method", *MEASURED) if key in row} for row in kept]


def by_level(
    levels: Mapping[str, float], planned: Mapping[str, Row], uniform: Sequence[Row], others: Sequence[Row]
) -> list[list[str]]:
    lines = [["bytes", "method", *METRICS]]
    methods = list(dict.fromkeys(row["method"] for row in others))
    for name, level in levels.items():
        row = planned.get(name)
        lines.append([name, PLAN, *("–" if row is None else f"{row[key]:.3f}" for key, _ in METRICS.values())])
        groups = {"spectral, uniform": uniform} | {m: [row for row in others if row["method"] == m] for m in methods}
        for method, of_method in groups.items():
            best = [(key, best_of(within(of_method, level), badness)) for key, badness in METRICS.values()]
            lines.append(["", method, *("–" if found is None else f"{found[key]:.3f}" for key, found in best)])
    return lines


def lost(levels: Mapping[str, float], planned: Mapping[str, Row], uniform: Sequence[Row], others: Sequence[Row]) -> str:
    lines = []
    for name, level in levels.items():
        ours = {"planned": [planned[name]] if name in planned else [], "uniform": within(uniform, level)}
        for metric, (key, badness) in METRICS.items():
            rival = best_of(within(others, level), badness)
            for kind, of_kind in ours.items():
                best = best_of(of_kind, badness)
                if rival and best and badness(rival) < badness(best):
                    theirs = (
                        f"{rival['method']} {rival[key]:.4f} ({describe(rival)}; {rival['bytes']:.4f} of the bytes)"
                    )
                    mine = f"spectral {kind} {best[key]:.4f} ({best['bytes']:.4f})"
                    lines.append(f"- {name}, {metric}: {theirs}, {mine}")
    return "\n".join(lines) or "None, of the budgets that `spectral` has a setting for."


def plan_rows(
    levels: Mapping[str, float],
    planned: Mapping[str, Row],
    plans: Mapping[str, Mapping[str, Any]],
    uniform: Sequence[Row],
) -> list[list[str]]:
    recall = next(iter(planned.values()))["scores"]
    lines = [["budget", "", "bytes", "perplexity / full", *recall, "error", "predicted", "alone"]]
    for name, level in levels.items():
        if name not in planned:
            continue
        predicted = plans[name]["predicted"]["attention_error"]
        alone = planned[name]["bytes"] + shared_of(plans[name]["layers"]) * (1 - 1 / BATCH)
        lines.append([name, plans[name]["kind"], *cells(planned[name]), f"{predicted:.3f}", f"{alone:.4f}"])
        best = best_of(within(uniform, level), lambda row: row["perplexity_ratio"])
        if best is not None:
            lines.append(["", f"uniform: {describe(best)}", *cells(best), "", ""])
    return lines


def shared_of(layers: Sequence[Mapping[str, Any]]) -> float:
    """Bytes of the codebooks and maps of all layers, over what dense attention reads of a row."""
    numbers = sum(CODEWORDS * (2 * DIMS + 1) + 2 * of["rank"] * DIMS for of in layers if of["method"] != "full")
    return numbers * 2 / (len(layers) * TOKENS * 2 * DIMS * 2)


def ablation_rows(ablated: Mapping[str, Row]) -> list[list[str]]:
    first = next(iter(ablated.values()))
    header = ["", "bytes", "perplexity / full", *first["scores"], "error"]
    return [header, *([name, *cells(row)] for name, row in ablated.items())]


def all_rows(rows: Sequence[Row]) -> list[list[str]]:
    header = ["method", "settings", "bytes", "perplexity / full", *rows[0]["scores"], "error", "resident"]
    ordered = sorted(rows, key=lambda row: (row["method"], row["bytes"]))
    return [
        header,
        *([row["method"], describe(row), *cells(row), f"{row['resident_bytes'] / 1e6:.2f} MB"] for row in ordered),
    ]


def cells(row: Row) -> list[str]:
    recall = [f"{value:.2f}" for value in row["scores"].values()]
    perplexity = f"{row['perplexity_ratio']:.4f} ± {row['perplexity_ratio_se']:.4f}"
    return [f"{row['bytes']:.4f}", perplexity, *recall, f"{row['error']:.3f}"]


def describe(row: Row) -> str:
    own = {name: value for name, value in parameters(row).items() if name not in ("method", *ADDED)}
    return " ".join(f"{name} {shown(value)}" for name, value in own.items())


def shown(value: Any) -> str:
    """1.0, a fraction, is not 1, a count."""
    return f"{value:.4g}" if isinstance(value, float) and value != 1.0 else str(value)


def settings_of(name: str, plan: Mapping[str, Any]) -> str:
    lines = [["layer", "settings"]]
    for layer, setting in enumerate(plan["layers"]):
        lines.append([str(layer), describe({**setting, "method": ""}) if setting["method"] != "full" else "dense"])
    return f"{name}:\n\n{table(lines)}"


def table(lines: Sequence[Sequence[str]]) -> str:
    header, *rows = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows])


HEAD = """# spectral at equal bytes

*The demo model's figures, which do not carry over to real ones: [real.md](real.md).*

`python benchmarks/spectral.py`: the demo model in bfloat16, 8 pieces of unseen text of 1024 tokens and 128 decoded
ones, 32 questions about one fact or one of eight in 1024 tokens (other words than the model was trained on), and the
artifact of `calibrate pca --model demo --data stdlib --seq-len 2048 --num-tokens 131072`. Plans were measured on other
windows and questions than these. Perplexities are ratios over the same 1024 predicted tokens, ± is the standard error
over windows.

Bytes are those of batches of 8 rows, which share codebooks and maps. A row by itself also reads the other 7/8 of them
("alone" in the table of plans), which vanishes with the length. At 1024 tokens codes, corrections and an eighth of the
tables are more than 1/32 of dense attention's bytes: there is no plan for that. One of 1024 scores or fewer is chosen
from exactly."""
LEVELS = """For each budget (bytes read per step over dense attention's; codes, tables, corrections and rows count) the
plan made for it, and of every other method the best row within it, or 6 % above, by each column on its own: a method's
three cells may come from three settings. Standard errors are in the table of every row.

"""
PLANNER = """The plan for a budget, by what it came from (losses weighted by layer, unweighted, or the same settings
in all layers), and the uniform settings of lowest perplexity within it. predicted: the attention error that the
planner expected, from other text and questions.

"""
ABLATION = """Around 32 dimensions in 2 bits, rows of 8 bits, a thirty-second of the tokens read exactly.

"""
