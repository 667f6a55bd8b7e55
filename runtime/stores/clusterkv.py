"""ClusterKV (Liu et al., 2024): recall whole clusters of semantically similar tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...artifacts import Artifact
from ..attention import Logits
from .amounts import Amount
from .clusters import Clusters
from .selecting import Chosen
from .sorted_by_cluster import Sorted, SortedStore, calibrated_centroids


@dataclass(frozen=True)
class ClusterKV(Sorted):
    keep: Amount = 1024
    """Tokens read per step, the sinks and the open window included: a count, or a fraction of the row's tokens."""
    select: str = "group"
    tokens_per_cluster: int = 16
    window: int = 320
    sinks: int = 16
    """First tokens, in no cluster and always read."""

    def build(self, layer: int, head_dim: int, artifact: Artifact | None) -> Callable[[], ClusterKVStore]:
        self.check()
        start = calibrated_centroids(artifact, layer)
        return lambda: ClusterKVStore(self, start)


class ClusterKVStore(SortedStore):
    selection: ClusterKV

    def _score(self, query: Tensor, logits: Logits) -> Tensor:
        centroids = self.clusters.keys
        self._read += centroids.nbytes + self.clusters.sizes.nbytes
        scores = logits.of(query.float() @ centroids.float().mT)
        return scores.masked_fill(~self.clusters.there(query.device).unsqueeze(2), -torch.inf)

    def _mean_logits(self, query: Tensor, logits: Logits, own: Tensor, clusters: Clusters) -> Tensor:
        """The scores: nothing is read again."""
        return own

    def _choose(self, scores: Tensor, budgets: list[int]) -> Chosen:
        return self.recall(scores, budgets)

    def _hide_open(self, scores: Tensor, clusters: Clusters) -> Tensor:
        return scores  # of clusters, which open tokens are not in
