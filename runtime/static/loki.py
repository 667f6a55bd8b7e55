"""Loki: low-rank scores, an exact choice of the best, attention to them, at fixed addresses."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.append import append
from ...kernels.attend import attend, unread
from ...kernels.dense import dense
from ...kernels.score import score
from ...kernels.select import select, select_threshold
from ..attention import Logits
from ..stores.loki import LokiStore
from ..stores.tail import OWNER
from ..stores.thresholds import bounds, room
from .clustered import ClusteredStep
from .step import kernel_logits


class LokiStep(ClusteredStep):
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
            append(key, value, key_map, held, written, index, self.clock.held)

    def attend(self, query: Tensor, logits: Logits) -> Tensor:
        store, rank, selection = self.store, self.store.basis.rank, self.store.selection
        query_map, _ = store.basis.maps(query)
        if store.rotates:
            query = query @ query_map.mT
            part, index = query[..., :rank], self.buffer("key")[..., :rank]
        else:
            part, index = query @ query_map[:, :rank].mT, self.buffer("index")[..., :rank]
        key, value = self.buffer("key"), self.buffer("value")
        if store.tail and not self.clustered:
            return dense(query, key, value, self.clock.seen, **kernel_logits(logits))
        scores = score(
            part.contiguous(),
            index,
            self.clock.seen,
            scaling=logits.scaling,
            softcap=logits.softcap,
            combine="max" if selection.select == "max" else "none",
            # 16-bit models' logits carry fewer digits than float16 does.
            out_dtype=torch.float32 if query.dtype == torch.float32 else torch.float16,
        )
        if selection.select == "group":
            scores = scores.float().log_softmax(-1).logsumexp(2)
        if not store.tail:
            return attend(query, key, value, *self._select(scores, part, logits), **kernel_logits(logits))
        # What is in no cluster is read whatever its score: the best there is.
        chosen = self._select(scores.masked_fill_(self._always(scores), torch.inf), part, logits)
        rest = self.tail(query, self._unread(*chosen), logits)
        return attend(query, key, value, *chosen, extra=[rest], **kernel_logits(logits))

    def _select(self, scores: Tensor, part: Tensor, logits: Logits) -> tuple[Tensor, Tensor]:
        """Of scores [B, Hkv, S], or [B, Hkv, G, S] by query head: (index […, K] int32, count […]).

        Args: part: [B, Hkv, G, r], the queries that scored.
        """
        selection, rows = self.store.selection, scores.flatten(1, -2)
        pairs = rows.shape[0] * rows.shape[1]
        if self._arrivals is None or len(self._arrivals) != pairs:
            self._arrivals = self.clock.held.new_zeros(pairs)
        wanted, seen, capacity = self.clock.budgets(selection), self.clock.seen, selection.most(self.capacity)
        if self.store.tail:
            wanted = self.clock.once(("with open", self.place()), self._with_open)
            capacity = max(capacity, selection.sinks + selection.window + 1)
        thresholds = self.store.thresholds
        if thresholds is None:
            index, count = select(rows, wanted, seen, capacity_out=capacity, arrivals=self._arrivals)
        else:
            place, low, high = self.clock.once(
                (selection.keep, selection.dense_below, thresholds.grid),
                lambda: (thresholds.place(wanted, seen), *bounds(wanted, seen)),
            )
            threshold = thresholds.at(part, place, logits).flatten(1)
            capacity = room(capacity, self.capacity)
            index, count = select_threshold(
                rows, threshold, seen, capacity, least=low, most=high, arrivals=self._arrivals
            )
        return index.unflatten(1, scores.shape[1:-1]), count.unflatten(1, scores.shape[1:-1])

    def _with_open(self) -> Tensor:
        """[B] int32: the budget, or what is read anyway."""
        return torch.maximum(self.clock.budgets(self.store.selection), self.open().number)

    def _always(self, scores: Tensor) -> Tensor:
        """Which of the slots are in no cluster, bool; broadcasts to scores [B, Hkv(, G), S]."""

        def reckon() -> Tensor:
            slot, of = torch.arange(scores.shape[-1], device=scores.device), self.open()
            return (slot < of.sinks.view(-1, 1, 1)) | (slot >= of.window.view(-1, 1, 1))

        always = self.clock.once(("always", self.place(), scores.shape[-1]), reckon)
        return always if scores.dim() == 3 else always.unsqueeze(2)

    def _unread(self, index: Tensor, count: Tensor) -> Tensor:
        """[B, Hkv(, G), C] float32: tokens of each cluster that are not among the `index` [B, Hkv(, G), K]."""
        of = self.open()
        return unread(index, count, self.buffer(OWNER).squeeze(-1), self._kept["size"], of.sinks, of.window)

    def _derive(self, size: Tensor) -> None:
        self.keep("size", size)

    @property
    def per_token(self) -> tuple[str, ...]:
        return ("key", "value") if self.store.rotates else ("key", "value", "index")
