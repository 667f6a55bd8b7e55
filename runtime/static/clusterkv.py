"""ClusterKV: whole clusters by their mean keys, sinks and the open window, at fixed addresses.

A layer's step launches append, score, select_runs, attend_runs and its merge (counted in kernels/select/README.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.attend import attend_runs
from ...kernels.dense import dense
from ...kernels.score import score
from ...kernels.select import select_runs
from ..attention import Logits
from ..stores.clusterkv import ClusterKVStore
from .clustered import ClusteredStep
from .step import kernel_logits


class ClusterKVStep(ClusteredStep):
    store: ClusterKVStore

    def attend(self, query: Tensor, logits: Logits) -> Tensor:
        key, value = self.buffer("key"), self.buffer("value")
        if not self.clustered:
            return dense(query, key, value, self.clock.seen, **kernel_logits(logits))
        scores = self.scores(query, logits)
        unread = torch.empty_like(scores, memory_format=torch.contiguous_format) if self.store.tail else None
        runs = self.choose(scores, unread)
        extra = [] if unread is None else [self.tail(query, unread, logits)]
        longest = self.store.selection.most(self.capacity)  # bounds the programs that a launch spends on it
        return attend_runs(query, key, value, *runs, extra=extra, most=longest, **kernel_logits(logits))

    def scores(self, query: Tensor, logits: Logits) -> Tensor:
        """[B, Hkv, C], or [B, Hkv, G, C] by query head: float32 of the clusters; -inf, or NaN, where a row has none."""
        select = self.store.selection.select
        scores = score(
            query.contiguous(),
            self.buffer("cluster.key"),
            self._counts,
            scaling=logits.scaling,
            softcap=logits.softcap,
            combine="max" if select == "max" else "none",
        )
        return scores.log_softmax(-1).logsumexp(2) if select == "group" else scores

    def choose(self, scores: Tensor, unread: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Sinks and open window, then whole clusters by score until the budget is filled, of the last its first tokens.

        Args:
            unread: like the scores, receives the tokens of each cluster that are not read.

        Returns:
            (starts, sizes [B, Hkv, R] or [B, Hkv, G, R], how many count), as `attend_runs` takes them.
        """
        own = scores.shape[1:-1]
        selection = self.store.selection
        runs = select_runs(
            scores.flatten(1, -2),
            self._kept["start"],
            self._kept["size"],
            self.clock.once(("room", self.place()), self._room),
            self._counts,
            leading=self.open().runs,
            # No cluster is empty.
            capacity_out=min(scores.shape[-1], selection.most(self.capacity)),
            unread=None if unread is None else unread.flatten(1, -2),
        )
        starts, sizes, count = (of.unflatten(1, own) for of in runs)
        return starts, sizes, count

    def _room(self) -> Tensor:
        """[B] int32: tokens that clusters may take."""
        return (self.clock.budgets(self.store.selection) - self.open().number).clamp_min(0)

    def _derive(self, size: Tensor) -> None:
        self.keep("size", size)
        self.keep("start", (size.cumsum(-1) - size + self.store.selection.sinks).to(torch.int32))

    @property
    def per_token(self) -> tuple[str, ...]:
        return ("key", "value", "position")
