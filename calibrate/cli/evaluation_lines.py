"""Lines about an evaluation that whoever reads its numbers should have read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...artifacts import Artifact
from .output import say


def say_low_scores(full: Mapping[str, Any]) -> None:
    """One line about the tasks that the model itself cannot answer. Args: full: the row of `full`."""
    from ..evaluation.rows import LOW, low_scores

    if low := low_scores(full):
        named = ", ".join(f"{task} {score:.2f}" for task, score in low.items())
        say(f"full itself scores below {LOW:g}: {named}: read the scores of methods relative to full's")


def say_calibration_text(artifact: Artifact, source: Mapping[str, Any]) -> None:
    """One line where the text is what the artifact was calibrated on. Args: source: what was read."""
    from ..evaluation.seen_text import overlap

    if seen := overlap(artifact.data, source):
        say(
            f"data {seen}: the artifact was calibrated on it, so methods may look better than they are: give other text"
        )
