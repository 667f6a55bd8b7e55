"""The figures of the stage `cla`: what sharing costs between layers, and the loss curve of an uptraining."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ...artifacts import Artifact
from ..palette import COMPARED_COLORS
from ..plots import png, title_of, two_panels
from .training_state import Record

_LIKENESS = {"key_r2": "keys", "value_r2": "values"}
_COSTS = {
    "as is": (COMPARED_COLORS[1], "s", "the storing layer's as they are"),
    "as group": (
        COMPARED_COLORS[0],
        "o",
        "the best for all layers from that one on (root mean square of their errors)",
    ),
}
_LOSSES = {"cross_entropy": "next token (cross entropy)", "kl": "KL(original ‖ shared)"}


def share_figure(artifact: Artifact, report: dict[str, Any]) -> bytes:
    """Left: R² of neighbours, aligned, held out. Right: output errors of reading the storing layer; groups shaded.

    On the right each reading layer of the chosen map has the error of reading its own group's storing layer, filled;
    the other layers that of reading the layer before, hollow: what they would cost.
    """
    figure, (likeness, costs) = two_panels()
    layers = [layer.index for layer in artifact.layers if layer.window is None]
    before = dict(zip(layers[1:], layers, strict=False))
    neighbours = [pair for pair in report["pairs"] if before.get(pair["reading"]) == pair["storing"]]
    for color, (measure, label) in zip(COMPARED_COLORS, _LIKENESS.items(), strict=False):
        places = [(pair["storing"] + pair["reading"]) / 2 for pair in neighbours]
        likeness.plot(places, [pair[measure] for pair in neighbours], marker="o", color=color, label=label)
    names = [f"{pair['storing']}→{pair['reading']}" for pair in neighbours]
    likeness.set_xticks([(pair["storing"] + pair["reading"]) / 2 for pair in neighbours], names)
    if len(neighbours) > 12:
        likeness.tick_params(axis="x", labelrotation=90, labelsize=7)
    likeness.axhline(0, color="0.6", linewidth=0.8, linestyle=":")
    lowest = min((pair[measure] for pair in neighbours for measure in _LIKENESS), default=0)
    likeness.set(ylim=(max(-1.0, min(-0.05, lowest - 0.05)), 1.05), xlabel="storing → reading layer")
    frame = "pre-rotary keys" if report["settings"]["keys_aligned"] == "pre" else "post-rotary keys"
    likeness.set_ylabel(f"R² on held-out tokens ({frame})")
    likeness.set_title("One layer's keys and values from the layer before, linearly", fontsize=10)
    likeness.legend(fontsize=8, frameon=False)

    shared = {pair["reading"]: pair for pair in report["pairs"] if pair["shared"]}
    others = {pair["reading"]: pair for pair in neighbours if pair["reading"] not in shared}
    for measure, (color, marker, label) in _COSTS.items():
        style = {"marker": marker, "linestyle": "none", "color": color}
        for pairs, more in ((shared, {"label": label}), (others, {"markerfacecolor": "none"})):
            errors = [_error(measure, pair, layers) for pair in pairs.values()]
            costs.plot(list(pairs), errors, **style, **more)
    costs.plot(
        [],
        [],
        marker="o",
        linestyle="none",
        color="0.5",
        markerfacecolor="none",
        label="hollow: layers that store; here as if they read the layer before",
    )
    stored = report["settings"]["stored_layers"]
    _shade(costs, report["groups"])
    costs.set_xticks(layers)
    if len(layers) > 16:
        costs.tick_params(axis="x", labelrotation=90, labelsize=7)
    highest = max((pair["cost_as_is"] for pair in (*shared.values(), *others.values())), default=1.0)
    costs.set(
        xlabel="reading layer", ylabel="‖o' - o‖ / ‖o‖ of its attention output", ylim=(0, 1.35 * max(1.0, highest))
    )
    costs.set_xlim(layers[0] - 0.6, layers[-1] + 0.6)
    costs.set_title(f"Cost of sharing; {stored} of {len(layers)} layers stored, groups shaded", fontsize=10)
    costs.legend(fontsize=8, frameon=False, loc="upper left")
    return png(figure, title_of(artifact))


def _error(measure: str, pair: dict[str, Any], layers: Sequence[int]) -> float:
    if measure == "as is":
        return float(pair["cost_as_is"])
    size = sum(pair["storing"] <= layer <= pair["reading"] for layer in layers)
    cost = pair["cost_as_group"]
    return math.nan if cost is None else math.sqrt(cost / size)


def _shade(axis: Any, groups: Sequence[Sequence[int]]) -> None:
    for group in groups:
        if len(group) > 1:
            axis.axvspan(group[0] - 0.4, group[-1] + 0.4, color="0.92", zorder=0, linewidth=0)


def loss_figure(history: Sequence[Record], title: str) -> bytes:
    """Left: the losses of every step, and their running means. Right: gradient norm and learning rate."""
    figure, (curves, norms) = two_panels()
    steps = range(1, len(history) + 1)
    for color, (name, label) in zip(COMPARED_COLORS, _LOSSES.items(), strict=False):
        values = [record[name] for record in history if name in record]
        if values:
            curves.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
            curves.plot(steps, running_mean(values), color=color, label=label)
    curves.set(xlabel="step", ylabel="nats per token", yscale="log")
    curves.set_title("Losses on the training text (running means in full colour)", fontsize=10)
    curves.legend(fontsize=8, frameon=False)
    norms.plot(steps, [record["gradient_norm"] for record in history], color=COMPARED_COLORS[2], linewidth=0.8)
    norms.set(xlabel="step", ylabel="norm of the gradient before clipping", yscale="log")
    norms.set_title("Gradient, and the learning rate (dotted)", fontsize=10)
    rates = norms.twinx()
    rates.plot(steps, [record["lr"] for record in history], color="0.4", linestyle=":")
    rates.set(ylabel="learning rate", ylim=(0, None))
    return png(figure, title)


def running_mean(values: Sequence[float]) -> list[float]:
    """For each value the mean of it and those before it, at most a twentieth of all."""
    width = max(1, len(values) // 20)
    windows = [values[max(0, end - width) : end] for end in range(1, len(values) + 1)]
    return [sum(window) / len(window) for window in windows]
