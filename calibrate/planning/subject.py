"""What a plan is made for: a model with its artifact, and how it decodes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ...artifacts import Artifact
from .kept import Kept

BATCH_SIZE = 8


@dataclass(frozen=True)
class Subject:
    model: Any
    artifact: Artifact
    tokenizer: Any = None
    """Of the model; needed where a check asks questions."""
    batch_size: int = BATCH_SIZE
    """Rows that are decoded together, and share what a step reads once."""
    kept: Kept = field(default_factory=Kept)
    """What was measured before, and is not measured again."""
