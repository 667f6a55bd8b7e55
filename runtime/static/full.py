"""`full`: attention to every token, at fixed addresses."""

from __future__ import annotations

from torch import Tensor

from ...kernels.dense import dense
from ..attention import Logits
from .step import Step, kernel_logits


class FullStep(Step):
    def attend(self, query: Tensor, logits: Logits) -> Tensor:
        return dense(query, self.buffer("key"), self.buffer("value"), self.clock.seen, **kernel_logits(logits))
