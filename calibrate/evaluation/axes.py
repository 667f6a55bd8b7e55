"""The axes of an evaluation's figure: fractions of bytes, and perplexity ratios with marks for what lies beyond."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LEAST_SPAN = 0.1
"""An axis of perplexity ratios reaches at least this far above 1, so that a loss of 1 % looks like one."""
MOST_RATIO = 2.0
"""Where it ends at most."""
_LABEL_WIDTH = 1.5
"""Labels of marks whose costs are within this factor would overlap."""


def ratio_limits(ratios: Sequence[float], most: float | None = None) -> tuple[float, float]:
    """Where an axis of perplexity ratios begins and ends: all that is drawn, and at least `LEAST_SPAN` above 1.

    It ends at four times what the upper quartile of the rows loses and at `MOST_RATIO` at most: a row that loses more
    would press the others together. It is marked at the edge.

    Args:
        most: the end, where it is chosen.
    """
    losses = sorted(max(0.0, ratio - 1) for ratio in ratios)
    if most is None:
        quartile = losses[min(len(losses) - 1, 3 * len(losses) // 4)] if losses else 0.0
        least = max(LEAST_SPAN, 4 * quartile)
        most = 1 + min(max(LEAST_SPAN, 1.05 * max(losses, default=0.0)), least, MOST_RATIO - 1)
    span = most - 1
    return min(1 - 0.1 * span, min(ratios, default=1.0) - 0.05 * span), most


def mark_beyond(axis: Any, beyond: Sequence[tuple[float, float, str]], most: float) -> None:
    """A hollow triangle at the upper edge for every point beyond it, with its value or the range of several.

    Args:
        beyond: (cost, value, colour).
        most: the upper edge.
    """
    left = sorted(beyond)
    for number, (share, _, color) in enumerate(left):
        axis.plot(
            [share],
            [most],
            marker="^",
            markerfacecolor="white",
            color=color,
            linestyle="none",
            clip_on=False,
            zorder=4,
            label=None if number else "beyond the panel, at these values",
        )
    while left:  # one label for those that lie side by side
        near = [point for point in left if point[0] <= _LABEL_WIDTH * left[0][0]]
        left = left[len(near) :]
        values = sorted({f"{value:.3g}" if value < 1e4 else f"{value:.0e}" for _, value, _ in near}, key=float)
        shown = values[0] if len(values) == 1 else f"{values[0]}–{values[-1]}"
        place = {"xytext": (0, 5), "textcoords": "offset points", "ha": "center", "fontsize": 7, "color": "0.3"}
        axis.annotate(shown, (near[0][0], most), **place)


def fraction_axis(axis: Any, shares: Sequence[float]) -> None:
    """Logarithmic, with powers of two as ticks."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.set_xscale("log", base=2)
    low, high = min(shares, default=1), max(shares, default=1)
    axis.set_xlim(low / 1.15, max(1.0, high) * 1.15)
    axis.xaxis.set_major_locator(FixedLocator([2.0**power for power in range(-12, 5)]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:g}" if share >= 1 else f"1/{1 / share:g}"))
