"""Methods of the sweeps at equal bytes: what one measured, beside what another would have at the bytes that it read.

Between two measured settings a curve is interpolated linearly in the logarithm of the bytes; beyond them it ends.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
HEADER = ["bytes read", "method", "keep", "/ full", "passkey", "multikey", "error", "layers 1–3"]


def comparisons(folder: Path) -> str:
    """Two tables, of the sweeps `clusters` and `group`; nothing while one of them is missing."""
    paths = {name: folder / f"{name}.json" for name in ("clusters", "group")}
    if not all(path.exists() for path in paths.values()):
        return ""
    sweeps = {name: json.loads(path.read_text())["results"] for name, path in paths.items()}
    full = sweeps["clusters"][0]["bytes_per_step"]
    clusterkv = {size: curve(sweeps["clusters"], "clusterkv", tokens_per_cluster=size) for size in (16, 80)}
    with_tail = {size: curve(sweeps["clusters"], "clusterkv", True, tokens_per_cluster=size) for size in (16, 80)}
    quest = curve(sweeps["group"], "quest")
    against = [
        line
        for size, rows in clusterkv.items()
        for line in both_ways((f"clusterkv, clusters of {size}", rows), ("quest", quest), full)
    ]
    tails = [
        line
        for size in (16, 80)
        for line in one_way(
            (f"clusters of {size}, tail", with_tail[size]), (f"clusters of {size}", clusterkv[size]), full
        )
    ]
    return (
        "## At equal bytes: ClusterKV and Quest\n\n"
        "Each measured setting, and below it the other method at the bytes that it read, interpolated (~) between "
        "measured settings;\na dash where it has none that read as little or as much. Quest per group.\n\n"
        f"{table(against)}\n\n## At equal bytes: ClusterKV with and without its tail\n\n"
        "Each setting with a tail, and below it one without at as many bytes.\n\n"
        f"{table(tails)}\n"
    )


def curve(rows: Iterable[Row], method: str, tail: bool = False, **settings: Any) -> list[Row]:
    """The settings of one method, by bytes; a setting that two sweeps measured once."""
    wanted = {"method": method, **settings}
    found = {
        row["bytes_per_step"]: row
        for row in rows
        if row.get("tail", False) == tail and all(row.get(name) == value for name, value in wanted.items())
    }
    return [found[read] for read in sorted(found)]


def numbers(row: Row) -> list[float]:
    recall = {name.partition("@")[0]: value for name, value in row["scores"].items()}
    errors = row["attention_error"]
    others = errors[1:]
    return [
        row["perplexity_ratio"],
        recall["passkey"],
        recall["multikey"],
        sum(errors) / len(errors),
        sum(others) / len(others),
    ]


def at(rows: Sequence[Row], read: float) -> list[float] | None:
    """A curve at these bytes; None beyond its ends."""
    for low, high in itertools.pairwise(rows):
        begin, end = low["bytes_per_step"], high["bytes_per_step"]
        if begin <= read <= end:
            share = math.log(read / begin) / math.log(end / begin)
            return [(1 - share) * a + share * b for a, b in zip(numbers(low), numbers(high), strict=True)]
    return None


def one_way(first: tuple[str, Sequence[Row]], second: tuple[str, Sequence[Row]], full: float) -> list[list[str]]:
    """Each setting of the first method, then the second at its bytes."""
    lines = []
    for row in reversed(first[1]):
        read = row["bytes_per_step"]
        lines.append([f"{read / full:.3f}", first[0], f"{row['keep']}", *cells(numbers(row))])
        lines.append(["", second[0], "~", *cells(at(second[1], read))])
    return lines


def both_ways(first: tuple[str, Sequence[Row]], second: tuple[str, Sequence[Row]], full: float) -> list[list[str]]:
    """`one_way` from either side, by bytes."""
    pairs = [
        one_way((name, [row]), other, full)
        for (name, rows), other in ((first, second), (second, first))
        for row in rows
    ]
    return [line for pair in sorted(pairs, key=lambda pair: -float(pair[0][0])) for line in pair]


def cells(found: Sequence[float] | None) -> list[str]:
    if found is None:
        return ["–"] * 5
    return [form % value for form, value in zip(("%.4f", "%.2f", "%.2f", "%.3f", "%.3f"), found, strict=True)]


def table(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [HEADER, ["---"] * len(HEADER), *lines])
