"""What sharing keys and values between layers costs before any training: by pattern, and by where a training starts."""

from __future__ import annotations

from typing import Any

from decoding import decode, text_and_passkey
from subjects import TEXTS, Bench

from kvcal.artifacts import Artifact

PATTERNS = ("uniform", "keep-ends", "dense-front", "dense-back", "auto")
"""In groups of two, or storing as many layers as those."""
STARTS: list[dict[str, Any]] = [
    {"method": "cla"},
    {"method": "cla", "uptrained": False, "pool": "mean"},
    {"method": "cla", "uptrained": False, "pool": "first"},
]
"""Fitted, which is what the artifact has, and pooled."""


def sharing(bench: Bench, only: str | None = None) -> None:
    """Perplexity and passkey of the paper's patterns and of auto's map, not trained."""
    if only not in (None, "cla"):
        return
    prompts = text_and_passkey(bench)
    for pattern in PATTERNS:
        decode(bench, f"sharing-{pattern}", prompts, STARTS, _fitted(bench, pattern))


def _fitted(bench: Bench, pattern: str) -> Artifact:
    """The artifact of short blocks with a map, and projections that were fitted for it to the calibration text."""
    share = ["share", "--model", bench.subject.spec, "--pattern", pattern]
    text = [part for spec in TEXTS["both"] for part in ("--data", spec)]
    return bench.changed(pattern, [share, [*share, "--uptrain", "--steps", "0", *text]])
