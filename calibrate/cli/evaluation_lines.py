"""Lines about an evaluation that whoever reads its numbers should have read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...artifacts import Artifact
from .output import say


def low_score_lines(full: Mapping[str, Any]) -> list[str]:
    """One line about the tasks that the model itself cannot answer, if there are any. Args: full: its row."""
    from ..evaluation.rows import LOW, low_scores

    named = ", ".join(f"{task} {score:.2f}" for task, score in low_scores(full).items())
    return [f"full itself scores below {LOW:g}: {named}: read scores relative to full's"] if named else []


def say_calibration_text(artifact: Artifact, source: Mapping[str, Any]) -> None:
    """One line where the text is what the artifact was calibrated on. Args: source: what was read."""
    from ..evaluation.seen_text import overlap

    if seen := overlap(artifact.data, source):
        say(
            f"data {seen}: the artifact was calibrated on it, so methods may look better than they are: give other text"
        )
