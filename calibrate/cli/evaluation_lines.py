"""Lines about an evaluation that readers of its numbers should see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .output import say

if TYPE_CHECKING:
    from ...artifacts import Artifact
    from ..evaluation.prompts import Prompts


def low_score_lines(full: Mapping[str, Any]) -> list[str]:
    """About the tasks that the model itself cannot answer, if there are any.

    Args:
        full: the row of `full`.
    """
    from ..evaluation.rows import LOW, low_scores

    low = low_scores(full)
    named = ", ".join(f"{task} {score:.2f}" for task, score in low.items())
    lines = [f"full itself scores below {LOW:g}: {named}: read scores relative to full's"] if low else []
    if not all(low.values()):
        unanswered = ", ".join(task for task, score in low.items() if not score)
        lines += [
            f"no answer of full's counts: {unanswered}: methods cannot be compared",
            "(--output FILE.json keeps them in FILE.predictions.jsonl; --match part counts answers within sentences)",
        ]
    return lines


def say_short_blocks(artifact: Artifact, prompts: Prompts, grid: Sequence[dict[str, Any]]) -> None:
    """Say so where what was fitted to rotated keys is used at positions beyond the blocks that it was fitted on."""
    from ..evaluation.grid import has_rotated_basis

    seq_len, longest = int(artifact.data["seq_len"]), prompts.longest_context
    fitted = [setting["method"] for setting in grid if has_rotated_basis(setting)]
    if fitted and longest > seq_len:
        say(
            f"contexts of {longest} tokens, and blocks of {seq_len} in calibration: {', '.join(dict.fromkeys(fitted))} "
            f"may do worse than calibrated with --seq-len {longest}"
        )


def say_unfitted(artifact: Artifact, grid: Sequence[dict[str, Any]]) -> None:
    """Say so where layers share projections that nobody has fitted: the mean of what they had."""
    from ...runtime.cla.method import STAGE, Cla, resolve

    shares = any(
        str(setting["method"]).split("+")[0] == "cla" and not {"pool", "groups"} & {*setting} for setting in grid
    )
    if shares and STAGE in artifact.stages and not resolve(Cla(), artifact).weights:
        say(
            f"{artifact.name}: its shared projections are the mean of their layers', which loses most: "
            f"`calibrate share {artifact.name} --model … --uptrain --steps 0 --data …` fits them"
        )


def say_calibration_text(artifact: Artifact, source: Mapping[str, Any]) -> None:
    """Say so where the text is what the artifact was calibrated on.

    Args:
        source: what was read.
    """
    from ..evaluation.seen_text import overlap

    if seen := overlap(artifact.data, source):
        say(
            f"data {seen}: the artifact was calibrated on it, so methods may look better than they are: give other text"
        )
