"""Loki: low-rank scores, an exact choice of the best, attention to them, at fixed addresses."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.append import append
from ...kernels.attend import attend
from ...kernels.score import score
from ...kernels.select import select
from ..attention import Logits
from ..stores.loki import LokiStore
from .clock import most
from .step import Step, kernel_logits


class LokiStep(Step):
    store: LokiStore
    _arrivals: Tensor | None = None
    """The workspace of `select`, which leaves it zero: made before a graph is captured, by the step that warms up."""

    def write(self, key: Tensor, value: Tensor) -> None:
        store = self.store
        _, key_map = store.basis.maps(key)
        if store.rotates:
            super().write((key.unsqueeze(2) @ key_map.mT).squeeze(2), value)
        else:
            held, written, index = (self.buffer(name) for name in ("key", "value", "index"))
            append(key, value, key_map, held, written, index, None, self.clock.held)

    def attend(self, query: Tensor, logits: Logits) -> Tensor:
        store, rank, selection = self.store, self.store.basis.rank, self.store.selection
        query_map, _ = store.basis.maps(query)
        if store.rotates:
            query = query @ query_map.mT
            part, index = query[..., :rank], self.buffer("key")[..., :rank]
        else:
            part, index = query @ query_map[:, :rank].mT, self.buffer("index")[..., :rank]
        scores = score(
            part.contiguous(),
            index,
            None,
            self.clock.seen,
            scaling=logits.scaling,
            softcap=logits.softcap,
            combine="max" if selection.select == "max" else "none",
            # 16-bit models' logits carry fewer digits than float16 does.
            out_dtype=torch.float32 if query.dtype == torch.float32 else torch.float16,
        )
        if selection.select == "group":
            scores = scores.float().log_softmax(-1).logsumexp(2)
        chosen, count = self._select(scores)
        return attend(query, self.buffer("key"), self.buffer("value"), chosen, count, **kernel_logits(logits))

    def _select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Of scores [B, Hkv, S], or [B, Hkv, G, S] by query head: (index […, K] int32, count […])."""
        selection, rows = self.store.selection, scores.flatten(1, -2)
        pairs = rows.shape[0] * rows.shape[1]
        if self._arrivals is None or len(self._arrivals) != pairs:
            self._arrivals = self.clock.held.new_zeros(pairs)
        index, count = select(
            rows,
            self.clock.budgets(selection),
            self.clock.seen,
            capacity_out=most(selection, self.capacity),
            arrivals=self._arrivals,
        )
        return index.unflatten(1, scores.shape[1:-1]), count.unflatten(1, scores.shape[1:-1])

    @property
    def per_token(self) -> tuple[str, ...]:
        return ("key", "value") if self.store.rotates else ("key", "value", "index")
