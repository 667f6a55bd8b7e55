"""docs/results/cla.md, from what benchmarks/cla.py measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Part:
    """One artifact."""

    name: str
    """Of its files."""
    rows: Sequence[Row]
    """Of `calibrate evaluate`, `full` first."""
    settings: Mapping[str, Any]
    """Of the stage `cla`, uptrained."""
    commands: Sequence[str]


def page(parts: Sequence[Part]) -> str:
    """
    Args:
        parts: uptrained on text; uptrained further on text with questions.
    """
    return "\n".join([HEAD, *(section(part, title) for part, title in zip(parts, TITLES, strict=True))])


def section(part: Part, title: str) -> str:
    done, full = part.settings["uptraining"], part.rows[0]
    steps, tokens = trained_on(done)
    lines = [["what", "perplexity", "/ full", *full["scores"], "resident", "read"], ["---"] * (5 + len(full["scores"]))]
    lines += [[name_of(row, part.settings), *cells(row, full)] for row in part.rows]
    first, last = (", ".join(f"{name} {value:.3f}" for name, value in done[key].items()) for key in LOSSES)
    return SECTION.format(
        title=title,
        name=part.name,
        commands="\n".join(part.commands),
        table="\n".join("| " + " | ".join(line) + " |" for line in lines),
        steps=steps,
        millions=tokens / 1e6,
        train=TRAINED[done["train"]],
        first=first,
        last=last,
        verdict=verdict(part),
    )


LOSSES = ("first_losses", "last_losses")
TRAINED = {"all": "all weights", "shared": "the shared projections and the reading layers' queries and norms"}
TARGET = 1.06


def trained_on(done: Mapping[str, Any]) -> tuple[int, int]:
    """(steps, tokens) of a training and those that it went on from."""
    earlier = trained_on(done["earlier"]) if done.get("earlier") else (0, 0)
    tokens = done["steps"] * done["batch_size"] * done["data"]["block_size"]
    return done["steps"] + earlier[0], tokens + earlier[1]


def name_of(row: Row, settings: Mapping[str, Any]) -> str:
    method = row["method"]
    own = method.partition("+")[2] or ("" if method.startswith("cla") else method)
    amounts = " ".join(f"{name} {row[name]}" for name in ("rank", "keep") if name in row)
    decoded = f"{own} {amounts}".strip()
    if not method.startswith("cla"):
        return f"original, {decoded}" if own != "full" else "original"
    groups = str(row.get("groups") or settings["groups"]).replace("/", ",")
    how = "uptrained" if row.get("uptrained", True) else f"not trained, pool {row.get('pool', 'mean')}"
    return f"`{groups}`, {how}" + (f", {decoded}" if decoded else "")


def cells(row: Row, full: Row) -> list[str]:
    recall = [f"{row['scores'][task]:.2f}" for task in full["scores"]]
    held, read = (row[name] / full[name] for name in ("resident_bytes", "bytes_per_step"))
    return [f"{row['perplexity']:.3f}", f"{row['perplexity_ratio']:.3f}", *recall, f"{held:.3f}", f"{read:.3f}"]


def verdict(part: Part) -> str:
    """What the numbers say, whichever they are."""
    untrained = {
        row.get("pool", "mean"): row["perplexity_ratio"]
        for row in part.rows
        if row["method"] == "cla" and row.get("uptrained") is False and not row.get("groups")
    }
    lines = []
    if untrained:
        better = "mean-pooling" if untrained["mean"] < untrained["first"] else "keeping the first layer's projections"
        lines.append(
            f"- Before training {better} is the better of the two on this model: {untrained['mean']:.2f} (mean) and "
            f"{untrained['first']:.2f} (first)\n  times the original's perplexity."
        )
    trained = next(row for row in part.rows if row["method"] == "cla" and row.get("uptrained", True))
    ratio = trained["perplexity_ratio"]
    reached = "is reached" if ratio <= TARGET else "is not reached"
    lines.append(f"- The target, {TARGET:g} times the original's perplexity at half the cache, {reached}: {ratio:.3f}.")
    recall = ", ".join(f"{task} {value:.2f}" for task, value in trained["scores"].items())
    lines.append(f"- Recall after uptraining: {recall}.")
    return "\n".join(lines)


TITLES = ("Uptrained on text alone", "Uptrained further, on text that asks to look back")
HEAD = """# Cross-layer attention on the demo model

*The demo model's figures, which do not carry over to real ones: [real.md](real.md).*

Made by `python benchmarks/cla.py`. Text and words of the questions were seen by neither training nor calibration.

perplexity: teacher-forced over the continuations, prefix 1024, prefilled densely by the same model.
passkey, multikey: exact recall of a five-digit code, one fact or one of eight. resident, read: bytes held and read per
step, as fractions of the original's with `full`, counted by the stores (float32 on a CPU).

Two layers to a group hold half the cache and read all of it, each reading layer with queries of its own: what lowers
the reads is the method after the `+`. `short.jsonl` and `long.jsonl` are of `benchmarks/recall_text.py`: stdlib
with facts and questions in it, and passages that come again, as the demo model was trained on.
"""
SECTION = """## {title}

```
{commands}
```

{table}

![losses of the (last) training]({name}.png)

{verdict}

In all {steps} steps and {millions:.1f} million tokens, {train}. Mean losses, in nats per token, of the first
tenth of the (last) training's steps: {first}; of its last tenth: {last}.
"""
