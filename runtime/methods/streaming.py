"""StreamingLLM (Xiao et al., 2023): the first tokens and the most recent ones.

Keys keep the rotary positions of the text; the paper renumbers them within the cache, which matters
only beyond the model's trained length.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...artifacts import Artifact
from .amounts import Budget, check_count
from .base import Method
from .evicting import ByAge


@dataclass(frozen=True)
class Streaming(Budget, Method):
    keeps_all_tokens = False
    sinks: int = 4
    """First tokens that stay; they are part of what is kept."""

    def bind(self, layer: int, head_dim: int, artifact: Artifact | None) -> ByAge:
        self.check()
        check_count("sinks", self.sinks)
        return ByAge(self, self.sinks)
