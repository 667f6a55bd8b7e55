"""The parts of the page about SubGen."""

from __future__ import annotations

import math
from pathlib import Path

from ..shared.lookup import read
from ..shared.tables import named, number, table, with_error
from .figure import CLUSTERS
from .subjects import Subject

COUNTS = (64, 1024)


def clusterable(folder: Path, subject: Subject) -> str:
    """The radius of the balls that 64 and 1024 greedy centers need, over that of one ball, means of KV heads; and δ·r,
    the exponent of the paper's bound, which wants t ≥ e^(2 δ r) ln n / ε² samples of a cluster: means, and the least of
    any head. Rotated keys, and keys before their rotation."""
    stages = read(folder / f"{subject.model}-subgen.json").get("clusterable", {})
    if not stages:
        return ""
    lines = []
    for post, pre in zip(stages["post"], stages["pre"], strict=True):
        cells = [str(post["layer"])]
        for entry in (post, pre):
            at = [entry["counts"].index(count) for count in COUNTS]
            cells += [" ".join(number(entry["radius"][each], ".2f") for each in at)]
            cells += [" ".join(number(entry["delta_r"][each], ".1f") for each in at)]
            cells += [number(entry["delta_r_least"][at[-1]], ".1f")]
        lines.append(cells)
    columns = ("radius at 64, 1024", "δ·r at 64, 1024", "least at 1024")
    header = ["layer", *(f"{stage}: {column}" for stage in ("post", "pre") for column in columns)]
    least = min(entry["delta_r_least"][entry["counts"].index(COUNTS[-1])] for entry in stages["post"])
    power = 2 * least / math.log(10)
    samples = f"The least δ·r of rotated keys, {least:.1f}, asks for 10^{power:.0f} samples times ln n / ε²."
    return f"![radius of the balls against their number]({CLUSTERS})\n\n{table(header, lines)}\n\n{samples}"


def estimates(folder: Path, subject: Subject) -> str:
    """In a fifth of the memory, in parts of the length of the attention's output, means of layers: the error, root
    mean square of 4 draws; spread, the root of their variance; bias, how far the mean of many draws would be off.
    Below, the three by layer; outside: the share of attention between the first four tokens and the window; values:
    mean length of the values there by attention, over that without."""
    found = read(folder / f"{subject.model}-subgen.json")
    if "estimates" not in found:
        return ""
    rows = found["estimates"]
    names = ("error", "spread", "bias")
    whole = [
        [named(row["setting"]), *(with_error(row[name], row[f"{name}_se"]) for name in names)]
        for row in rows + found.get("splits", [])
    ]
    outside = {
        row["layer"]: [with_error(row[name], row[f"{name}_se"], ".2f") for name in ("mass", "values")]
        for row in found.get("outside", [])
    }
    by_layer = [
        [
            str(layer),
            *outside.get(layer, ["–"] * 2),
            *(" ".join(number(row[f"{name}_by_layer"][at], ".2f") for name in names) for row in rows),
        ]
        for at, layer in enumerate(rows[0]["layers"])
    ]
    header = [
        "layer",
        "outside",
        "values",
        *(f"{row['setting']['method']} {row['setting'].get('normaliser', '')}" for row in rows),
    ]
    return f"{table(['method', *names], whole)}\n\n{table(header, by_layer)}"


def lines(folder: Path, subject: Subject) -> str:
    """Line retrieval: the code of one of so many words is asked for, after an example; right answers, in a fifth of the
    memory."""
    columns: dict[str, dict[str, str]] = {}
    for path in sorted(folder.glob(f"{subject.model}-lines-*.json")):
        for row in read(path)["results"]:
            name = f"`{row['method']}` {row.get('normaliser', '')}".strip()
            (score,), (error,) = row["scores"].values(), row["scores_se"].values()
            columns.setdefault(name, {})[path.stem.rpartition("-")[2]] = with_error(score, error, ".2f")
    counts = list(next(iter(columns.values()), {}))
    body = [[name, *(found.get(count, "") for count in counts)] for name, found in columns.items()]
    return table(["method", *(f"{count} lines" for count in counts)], body) if body else ""
