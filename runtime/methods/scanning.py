"""The step of a method in one kernel, which scores tokens, chooses among them and attends (`kernels/scan`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ...kernels.scan import Tables, Tokens, kernel_for, run
from ..attention import SoftmaxSpec
from ..kv.pages import LayerCache
from .base import Attended, Marked
from .choosing import Counts

SCAN = "scan"
"""Where a cache keeps its `Scan`, see `LayerCache.prepared`."""


@dataclass(frozen=True, eq=False)
class Scan:
    """What is scanned of one layer: made once, as long as its buffers stand still."""

    tokens: Tokens
    tables: Tables
    bits: int | None = None
    """Of codes; None: tokens are scored by reduced keys."""
    residual: bool = False

    @classmethod
    def of(cls, cache: LayerCache, made: Callable[[], Scan | None]) -> Scan | None:
        """What `made` gives, once as long as the buffers stand still; None: no kernel takes what this cache holds."""

        def make() -> Scan | None:
            return made() if cache.offloaded is None else None

        return cache.prepared(SCAN, make)

    def step(
        self, query: Tensor, cache: LayerCache, counts: Counts, select: str, sample: int, spec: SoftmaxSpec
    ) -> Attended | None:
        """
        Args:
            query: [B, Hq, 1, D], in the basis of the keys that are kept.
            sample: see `Counts.scan_budget`.

        Returns:
            None: no kernel takes it.
        """
        budget = cache.metadata.once((counts, sample), lambda: counts.scan_budget(sample))
        batch, _, _, width = query.shape
        grouped = query.reshape(batch, self.tokens.key.shape[1], -1, width)
        table = cache.metadata.table
        kernel = kernel_for(grouped, self.tokens, self.tables, budget, paged=table is not None)
        if kernel == "reference":
            return None
        out, read = run(
            kernel, grouped, self.tokens, self.tables, budget, table=table, bits=self.bits, select=select,
            residual=self.residual, scaling=spec.scaling, softcap=spec.softcap, sink_logits=spec.sink_logits,
            marked=not cache.metadata.replayed,
        )  # fmt: skip
        out = out.view(batch, -1, 1, out.shape[-1]).to(query.dtype)
        return Attended(out, None if read is None else Marked(read))
