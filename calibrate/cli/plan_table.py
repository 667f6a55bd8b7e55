"""A plan as a table for people."""

from __future__ import annotations

from typing import Any

from .numbers import fixed, plain
from .output import print_lines, print_table, say


def print_plan(body: dict[str, Any]) -> None:
    """A line for each layer; then what was predicted and what a check has measured.

    Args:
        body: of plan.json.
    """
    offers = body["offers"]
    rows = []
    for layer, setting in enumerate(body["layers"]):
        if setting is None:
            continue
        point = next(point for point in offers[str(layer)] if point["setting"] == setting)
        by_head = " ".join(fixed(error, 3) for error in point["head_errors"])
        rows.append(
            [
                str(layer),
                setting["method"],
                _described(setting),
                f"{point['bytes']:.4f}",
                fixed(point["error"], 3),
                by_head,
            ]
        )
    budget = ", ".join(f"{name} {plain(value)}" for name, value in body["budget"].items())
    title = f"{body['model']}, batches of {body['batch_size']}: {budget}"
    print_table(title, ["layer", "method", "settings", "bytes", "error", "by KV head"], rows)
    if body["candidates"]:
        title = "decoded at this budget; divergence: of next tokens from full's, in nats"
        print_table(title, ["candidate", "bytes", "divergence"], list(map(_candidate, body["candidates"])))
    predicted, measured = body["predicted"], body["measured"]
    ratio = "beyond measure" if measured["perplexity_ratio"] is None else fixed(measured["perplexity_ratio"], 4)
    full = body["full"]["scores"]
    scores = "".join(f"; {task} {value:.2f} (full {full[task]:.2f})" for task, value in measured["scores"].items())
    dropped = "".join(f"; {task} {value:.2f}" for task, value in body["dropped"].items())
    print_lines(
        f"predicted: {predicted['bytes']:.4f} of dense attention's bytes in these layers, attention error "
        f"{predicted['attention_error']:.3f}",
        f"measured:  {measured['bytes']:.4f}, attention error {measured['attention_error']:.3f}, perplexity "
        f"{ratio} of full's{scores}",
        *([f"left out:  what full itself cannot answer{dropped}"] if dropped else []),
    )


def say_warnings(body: dict[str, Any]) -> None:
    """Say what the check found against a plan.

    Args:
        body: of plan.json.
    """
    budget = body["budget"].get("bytes")
    if body["warnings"]:
        more = "give a higher --quality" if budget is None else "give more --bytes"
        say(f"this plan ruins what it was checked on: {'; '.join(body['warnings'])}: {more}, or another --method")
    read = body["measured"]["bytes"]
    if budget is not None and read > budget * 1.02:
        say(f"the check read {read:.4f} of dense attention's bytes, more than the budget of {budget:g}")


def _candidate(found: dict[str, Any]) -> list[str]:
    what = f"by layer, {found['kind']}" if found["setting"] is None else f"uniform: {_described(found['setting'])}"
    return [what, f"{found['bytes']:.4f}", plain(found["divergence"])]


def _described(setting: dict[str, Any]) -> str:
    return " ".join(f"{name} {value}" for name, value in setting.items() if name != "method")
