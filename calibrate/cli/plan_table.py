"""A plan as a table for people."""

from __future__ import annotations

from typing import Any

from .output import print_lines, print_table


def print_plan(body: dict[str, Any]) -> None:
    """A line for each layer; then what was predicted and what a check has measured. Args: body: of plan.json."""
    offers = body["offers"]
    rows = []
    for layer, setting in enumerate(body["layers"]):
        if setting is None:
            continue
        point = next(point for point in offers[str(layer)] if point["setting"] == setting)
        settings = " ".join(f"{name} {value}" for name, value in setting.items() if name != "method")
        by_head = " ".join(f"{error:.3f}" for error in point["head_errors"])
        rows.append(
            [str(layer), setting["method"], settings, f"{point['bytes']:.4f}", f"{point['error']:.3f}", by_head]
        )
    budget = ", ".join(f"{name} {value:g}" for name, value in body["budget"].items())
    title = f"{body['model']}, batches of {body['batch_size']}: {budget}"
    print_table(title, ["layer", "method", "settings", "bytes", "error", "by KV head"], rows)
    predicted, measured = body["predicted"], body["measured"]
    ratio = "beyond measure" if measured["perplexity_ratio"] is None else f"{measured['perplexity_ratio']:.4f}"
    full = body["full"]["scores"]
    scores = "".join(f"; {task} {value:.2f} (full {full[task]:.2f})" for task, value in measured["scores"].items())
    dropped = "".join(f"; {task} {value:.2f}" for task, value in body["dropped"].items())
    print_lines(
        f"predicted: {predicted['bytes']:.4f} of dense attention's bytes, attention error "
        f"{predicted['attention_error']:.3f}",
        f"measured:  {measured['bytes']:.4f}, attention error {measured['attention_error']:.3f}, perplexity "
        f"{ratio} of full's{scores}",
        *([f"left out:  what full itself cannot answer{dropped}"] if dropped else []),
    )
