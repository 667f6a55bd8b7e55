"""The figure of an evaluation: quality against the bytes that a decoded token reads, and those that are held.

Every method has its colour and marker of the palette. A method's points, and the Pareto front of all, are joined by a
line where there are three or more: through two points any line goes.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..palette import style_of
from ..plots import plain_name, png, rows_of_two_panels, short_name
from .axes import fraction_axis, mark_beyond, ratio_limits
from .results_file import parameters
from .rows import mean_score

_COSTS = {
    "bytes_per_step": ("bytes read per step, as a fraction of full", "bytes read"),
    "resident_bytes": ("bytes allocated, as a fraction of full", "bytes allocated"),
}
ALIKE = 1.1
"""Costs within this factor are one: a line through such points would lead from one quality to the other and back."""
LINE_FROM = 3
"""Points that a line is drawn through, at least."""
_LINES = ("-", "--", ":", "-.")
"""Of the lines of one method, whose settings differ."""
_CHOICES = ("basis", "stage", "select", "groups", "pool")


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices, by rising cost, of the points (cost, badness) that no other point beats: none has less of one of the two
    and no more of the other."""
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda index: points[index]):
        if not front or points[index][1] < points[front[-1]][1] or points[index] == points[front[-1]]:
            front.append(index)
    return front


def series_of(row: Mapping[str, Any], varied: Container[str] = ()) -> str:
    """The name of a row's line in the legend: its method, the words chosen for `_CHOICES`, and the settings in which
    rows of the method differ ("loki score tail True"). `keep` varies along the line."""
    words = []
    for name, value in parameters(row).items():
        if isinstance(value, str) and name in _CHOICES:
            words.append(value)
        elif name == "uptrained":
            words += [] if value else ["untrained"]
        elif name in varied:
            words.append(f"{name} {value}")
    return " ".join([name_of(row), *words])


def varied_settings(rows: Sequence[Mapping[str, Any]]) -> set[str]:
    """Names of the settings, other than `keep`, that have several values among the rows of some method."""
    values: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        for name, value in parameters(row).items():
            if name not in ("method", "keep"):
                values.setdefault((name_of(row), name), set()).add(repr(value))
    return {name for (_, name), found in values.items() if len(found) > 1}


def name_of(row: Mapping[str, Any]) -> str:
    """A row's method, and its source where it comes from another results file."""
    return f"{row['method']} ({row['source']})" if row.get("source") else str(row["method"])


def evaluation_figure(
    settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], most_ratio: float | None = None
) -> bytes:
    """PNG of `draw_evaluation`."""
    return png(*draw_evaluation(settings, rows, most_ratio))


def draw_evaluation(
    settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], most_ratio: float | None = None
) -> tuple[Any, str]:
    """Left: perplexity over `full`'s. Right: mean score of the tasks. Above against bytes read per step, below against
    bytes held, both as fractions of `full`'s, with standard errors as bars.

    Args:
        most_ratio: where the left panels end, see `ratio_limits`.

    Returns:
        (matplotlib's figure, its title).
    """
    full = next(row for row in rows if row["method"] == "full" and not row.get("source"))
    costs = [name for name in _COSTS if full.get(name)] or list(_COSTS)[:1]
    figure, axes = rows_of_two_panels(len(costs))
    varied = varied_settings(rows)
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        lines.setdefault(series_of(row, varied), []).append(row)
    tasks = list(full.get("scores") or {})
    of_tasks = f"score, {short_name(tasks[0])}" if len(tasks) == 1 else "score, mean of tasks"
    for panels, cost in zip(axes, costs, strict=True):
        shares = [
            *_panel(panels[0], lines, full, cost, _Quality("perplexity / perplexity of full", _ratio, 1, most_ratio)),
            *_panel(panels[1], lines, full, cost, _Quality(of_tasks, mean_score, -1)),
        ]
        for axis in panels:
            fraction_axis(axis, shares)
        panels[1].set_ylim(-0.03, 1.03)
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        found, labels = axis.get_legend_handles_labels()
        handles |= dict(zip(labels, found, strict=True))
    figure.legend(handles.values(), handles.keys(), fontsize=8, frameon=False, loc="outside right center")
    prefix = f", prefix {settings['prefix']}" if full.get("perplexity_ratio") is not None else ""
    against = " and ".join(_COSTS[cost][1] for cost in costs)
    return figure, f"{plain_name(settings['model'])}{prefix}: quality against {against}"


@dataclass(frozen=True)
class _Quality:
    label: str
    measured: Callable[[Mapping[str, Any]], tuple[float | None, float | None]]
    sign: int
    """1: less is better; -1: more is."""
    most: float | None = None
    """Where the axis of a ratio ends; None: see `ratio_limits`."""


def _panel(
    axis: Any,
    lines: Mapping[str, Sequence[Mapping[str, Any]]],
    full: Mapping[str, Any],
    cost: str,
    quality: _Quality,
) -> list[float]:
    """Draw a quality against a cost, a line for each entry of `lines`: its costs as fractions of `full`'s."""
    placed: list[tuple[float, float]] = []
    colored: list[tuple[float, float, str]] = []
    drawn: dict[str, int] = {}
    for name, rows in lines.items():
        line = []
        for row in rows:
            value, error = quality.measured(row)
            if row.get(cost) and value is not None:
                line.append((row[cost] / full[cost], value, error or 0))
        if not line:
            continue
        line.sort()
        placed += [(share, value) for share, value, _ in line]
        style = style_of(name)
        colored += [(share, value, style.color) for share, value, _ in line]
        number = drawn[style.color] = drawn.get(style.color, -1) + 1
        joined = len(line) >= LINE_FROM and line[-1][0] > ALIKE * line[0][0]
        axis.errorbar(
            [share for share, *_ in line],
            [value for _, value, _ in line],
            yerr=[error for *_, error in line] if any(error for *_, error in line) else None,
            capsize=2,
            elinewidth=0.8,
            marker=style.marker,
            color=style.color,
            markersize=7,
            markerfacecolor=style.color if number % 2 == 0 else "white",
            markeredgecolor="white" if number % 2 == 0 else style.color,
            markeredgewidth=0.5 if number % 2 == 0 else 1.2,
            linestyle=_LINES[number % len(_LINES)] if joined else "none",
            linewidth=0.8,
            alpha=0.9,
            zorder=3,
            label=short_name(name),
        )
    if not placed:
        axis.set_axis_off()
        axis.text(0.5, 0.5, f"{quality.label}: not evaluated", ha="center", transform=axis.transAxes, color="0.5")
        return []
    # Bytes that differ by less than a thousandth of full's count as the same.
    front = pareto_front([(round(share, 3), quality.sign * value) for share, value in placed])
    if len(front) >= LINE_FROM:
        axis.plot(
            *zip(*(placed[at] for at in front), strict=True),
            color="0.85",
            linewidth=6,
            solid_capstyle="round",
            zorder=1,
            label="Pareto front",
        )
    if quality.sign > 0:
        low, most = ratio_limits([value for _, value in placed], quality.most)
        axis.set_ylim(low, most)
        mark_beyond(axis, [point for point in colored if point[1] > most], most)
    axis.axhline(quality.measured(full)[0], color="0.6", linewidth=0.8, linestyle=":", zorder=0)
    axis.set_xlabel(_COSTS[cost][0])
    axis.set_ylabel(quality.label, parse_math=False)
    return [share for share, _ in placed]


def _ratio(row: Mapping[str, Any]) -> tuple[float | None, float | None]:
    return row.get("perplexity_ratio"), row.get("perplexity_ratio_se")
