"""The loss curve of an uptraining."""

from __future__ import annotations

from collections.abc import Sequence

from ..plots import png, two_panels
from .training_state import Record

_LABELS = {"cross_entropy": "next token (cross entropy)", "kl": "KL(original ‖ shared)"}


def loss_figure(history: Sequence[Record], title: str) -> bytes:
    """Left: the losses of every step, and their running means. Right: gradient norm and learning rate."""
    figure, (curves, norms) = two_panels()
    steps = range(1, len(history) + 1)
    for column, (name, label) in enumerate(_LABELS.items()):
        values = [record[name] for record in history if name in record]
        if values:
            curves.plot(steps, values, color=f"C{column}", alpha=0.25, linewidth=0.8)
            curves.plot(steps, running_mean(values), color=f"C{column}", label=label)
    curves.set(xlabel="step", ylabel="nats per token", yscale="log")
    curves.set_title("Losses on the training text (running means in full colour)", fontsize=10)
    curves.legend(fontsize=8, frameon=False)
    norms.plot(steps, [record["gradient_norm"] for record in history], color="C2", linewidth=0.8)
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
