"""docs/results/staleness.md and its figure."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..shared.lookup import load, pick
from ..shared.page import Figure, Page
from ..shared.tables import number, table
from . import __main__ as staleness
from .__main__ import GREW, REBUILT, REBUILT_ALL, TEXTS

FEW, SHARE = "256 tokens", "an eighth of the tokens"
"""What is read, of the two parts."""


def values(results: Path) -> dict[str, Any]:
    found = load(results / "demo" / "staleness.json")
    return {
        "recall": partial(binned, found, "recall"),
        "mass": partial(binned, found, "mass"),
        "read": lambda budget, method: number(pick(found, (budget, method, "read"), "staleness.json")),
        "few": FEW,
        "share": SHARE,
        "sections": {budget: (settings(part), *(by_steps(part, name) for name in ("recall", "mass")))
                     for budget, part in found.items()},
        "texts": TEXTS,
        "prefix": staleness.PREFIX,
        "tokens": staleness.TOKENS,
        "checkpoints": staleness.CHECKPOINTS,
    }  # fmt: skip


def binned(found: Mapping[str, Any], name: str, budget: str, method: str, at: int, kind: str = GREW) -> str:
    """
    Args:
        at: a bin of decoded tokens: 0 is the first, -1 the last.
    """
    return number(pick(found, (budget, method, kind), "staleness.json")[at][name])


def settings(part: Mapping[str, Any]) -> str:
    rows = [
        [method, " ".join(f"{name} {value}" for name, value in entry["settings"].items()), number(entry["read"])]
        for method, entry in part.items()
    ]
    return table(["method", "settings", "bytes read / dense"], rows)


def by_steps(part: Mapping[str, Any], name: str) -> str:
    steps = [f"{row['to_step']:.0f}" for row in part["exact_topk"][GREW]]
    rows = [
        [method if kind == GREW else f"· {kind}", *(number(row[name]) for row in entry[kind])]
        for method, entry in part.items()
        for kind in (GREW, REBUILT, REBUILT_ALL)
        if kind in entry
    ]
    return table(["method", *steps], rows)


def figures(results: Path) -> list[Figure]:
    path = results / "demo" / "staleness.json"
    return [Figure("staleness.png", [path], lambda: figure(load(path)))]


PAGE = Page("staleness.md", Path(__file__).with_name("page.md.j2"), values, figures)


def figure(results: dict[str, Any]) -> bytes:
    from kvcal.calibrate.plots import png, two_panels

    drawing, (left, right) = two_panels()
    (first, of_count), (_, of_share) = results.items()
    ceiling = [row["mass"] for row in of_count["exact_topk"][GREW]]
    for method, found in of_count.items():
        if method != "exact_topk":
            steps = [row["to_step"] for row in found[GREW]]
            share = [row["mass"] / best for row, best in zip(found[GREW], ceiling, strict=True)]
            left.plot(steps, share, marker="o", markersize=4, label=method)
    left.set(xlabel="decoded tokens", ylabel="attention mass read / exact_topk's", title=f"{first} read")
    left.legend(fontsize=8, frameon=False)
    colors = {"clusterkv, clusters of 16": "C3", "clusterkv, clusters of 80": "C4"}
    lines = {GREW: "-", REBUILT: "--", REBUILT_ALL: ":"}
    for method, color in colors.items():
        for kind, line in lines.items():
            rows = of_share[method][kind]
            right.plot(
                [row["to_step"] for row in rows],
                [row["recall"] for row in rows],
                color=color,
                linestyle=line,
                label=f"{method.removeprefix('clusterkv, ')}, {kind}",
            )
    right.set(xlabel="decoded tokens", ylabel="recall of the top tokens", title="clusterkv, an eighth read")
    right.legend(fontsize=8, frameon=False)
    return png(drawing, f"demo model, {TEXTS} unseen texts")
