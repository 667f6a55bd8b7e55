"""What the decoded steps of one setting on one batch cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...runtime import CompressedCache
from .attention_error import AttentionProbe, now
from .measurements import Measured


class Costs:
    """Bytes and time of decoded steps."""

    def __init__(self, cache: CompressedCache, device: torch.device):
        self.cache, self.device = cache, device
        self._read: list[int] = []
        self._ms: list[float] = []

    def of_a_step(self, probe: AttentionProbe | None = None) -> _Timed:
        """A context around the model's call, which counts it as a step.

        Args:
            probe: its own seconds are subtracted from the step's.
        """
        return _Timed(self, probe)

    def add(self, seconds: float) -> None:
        self._ms.append(1000 * seconds)
        self._read.append(self.cache.bytes_read())

    def measured(self, **found: Any) -> Measured:
        rows = len(found.get("nll") or found["samples"])
        return Measured(
            **{"rows": rows, "nll": [], "samples": [], **found},
            resident_bytes=self.cache.resident_bytes(),
            bytes_read=self._read,
            ms=self._ms,
            device_hits=list(self.cache.device_hits()),
        )


@dataclass
class _Timed:
    costs: Costs
    probe: AttentionProbe | None

    def __enter__(self) -> None:
        self._probed = self.probe.seconds if self.probe else 0.0
        self._started = now(self.costs.device)

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            probed = (self.probe.seconds if self.probe else 0.0) - self._probed
            self.costs.add(now(self.costs.device) - self._started - probed)
