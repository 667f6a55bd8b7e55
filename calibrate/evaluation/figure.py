"""The figure of an evaluation: quality against the bytes that a decoded token reads."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

from ..plots import png, short_name, two_panels
from .results_file import parameters
from .rows import mean_score

_MARKERS = "osD^vPXp<>hd"
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
    """Left: perplexity over `full`'s. Right: mean score of the tasks. Both against bytes per step as a fraction of
    `full`'s, with standard errors as bars.

    Args:
        most_ratio: where the left panel ends; lines of methods that lose more leave it.
    """
    full = next(row for row in rows if row["method"] == "full" and not row.get("source"))
    figure, axes = two_panels()
    varied = varied_settings(rows)
    names = list(dict.fromkeys(series_of(row, varied) for row in rows))
    tasks = list(full.get("scores") or {})
    panels = [
        ("perplexity / perplexity of full", _ratio, 1),
        (f"score, {short_name(tasks[0])}" if len(tasks) == 1 else "score, mean of tasks", mean_score, -1),
    ]
    shares: list[float] = []
    for axis, (label, quality, sign) in zip(axes, panels, strict=True):
        placed: list[tuple[Mapping[str, Any], float, float, float | None]] = []
        for row in rows:
            value, error = quality(row)
            if row.get("bytes_per_step") and value is not None:
                placed.append((row, row["bytes_per_step"] / full["bytes_per_step"], value, error))
        if not placed:
            axis.set_axis_off()
            axis.text(0.5, 0.5, f"{label}: not evaluated", ha="center", transform=axis.transAxes, color="0.5")
            continue
        shares += [share for _, share, *_ in placed]
        # Bytes that differ by less than a thousandth of full's count as the same.
        front = [placed[at] for at in pareto_front([(round(share, 3), sign * value) for _, share, value, _ in placed])]
        axis.plot(
            [share for _, share, *_ in front],
            [value for _, _, value, _ in front],
            color="0.85",
            linewidth=6,
            solid_capstyle="round",
            zorder=1,
            label="Pareto front",
        )
        for number, name in enumerate(names):
            line = sorted(
                (share, value, error or 0) for row, share, value, error in placed if series_of(row, varied) == name
            )
            if line:
                axis.errorbar(
                    [share for share, *_ in line],
                    [value for _, value, _ in line],
                    yerr=[error for *_, error in line] if any(error for *_, error in line) else None,
                    capsize=2,
                    elinewidth=0.8,
                    marker=_MARKERS[number % len(_MARKERS)],
                    color="black" if name == "full" else f"C{(number - 1) % 10}",
                    markersize=7,
                    markeredgecolor="white",
                    markeredgewidth=0.5,
                    linewidth=0.8,
                    alpha=0.9,
                    zorder=3,
                    label=short_name(name),
                )
        axis.axhline(quality(full)[0], color="0.6", linewidth=0.8, linestyle=":", zorder=0)
        axis.set_xlabel("bytes read per step, as a fraction of full")
        axis.set_ylabel(label, parse_math=False)
    for axis in axes:
        _fraction_axis(axis, shares)
    handles: dict[str, Any] = {}
    for axis in axes:
        found, labels = axis.get_legend_handles_labels()
        handles |= dict(zip(labels, found, strict=True))
    figure.legend(handles.values(), handles.keys(), fontsize=8, frameon=False, loc="outside right center")
    if most_ratio is not None:
        axes[0].set_ylim(1 - 0.03 * (most_ratio - 1), most_ratio)
    axes[1].set_ylim(-0.03, 1.03)
    prefix = f", prefix {settings['prefix']}" if full.get("perplexity_ratio") is not None else ""
    return png(figure, f"{settings['model']}{prefix}: quality against bytes read")


def _ratio(row: Mapping[str, Any]) -> tuple[float | None, float | None]:
    return row.get("perplexity_ratio"), row.get("perplexity_ratio_se")


def _fraction_axis(axis: Any, shares: Sequence[float]) -> None:
    """Logarithmic, with powers of two as ticks."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.set_xscale("log", base=2)
    low, high = min(shares, default=1), max(shares, default=1)
    axis.set_xlim(low / 1.15, max(1.0, high) * 1.15)
    axis.xaxis.set_major_locator(FixedLocator([2.0**power for power in range(-12, 5)]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:g}" if share >= 1 else f"1/{1 / share:g}"))
