"""ClusterKV and its tail as formulas, given which tokens are in which cluster: one head at a time, in float64.

The clustering itself is read from the store's tensors and held against k-means in test_kmeans.py. All else,
centroids, mean values, selection, attention, is computed here from the row's own keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from oracle_heads import Head, budget, heads_at
from oracles import rankings
from sequences import Row, Step, append, assert_steps
from torch import Tensor

from kvcal.runtime.attention import SoftmaxSpec
from kvcal.runtime.methods.clusters import Clusters
from kvcal.runtime.store import Store


@dataclass(frozen=True)
class Clustering:
    """Of one row and KV head, at one step."""

    members: list[Tensor]
    """Positions of each cluster's tokens, in the order in which they are stored."""
    open: Tensor
    """Positions of the tokens in no cluster: sinks, and what came since the last clustering."""

    @property
    def tokens(self) -> int:
        return sum(map(len, self.members)) + len(self.open)


Rule = Callable[[list[Head], int, Clustering, dict[str, Any]], list[Tensor]]
"""Which tokens each head of a group reads."""


def clustering_of(store: Store, row: int, head: int) -> Clustering:
    """Every token in exactly one place, or an AssertionError."""
    clusters, length = store.sequence_index, store.lengths[row]
    assert isinstance(clusters, Clusters)
    count, upto = clusters.counts[row], clusters.upto[row]
    begin = min(clusters.sinks, length)
    members: list[Tensor] = []
    if count:
        sizes = clusters.buffers["cluster.size"].view[row, head, :count, 0].tolist()
        assert begin + sum(sizes) == upto
        listed = clusters.buffers["cluster.members"].view[row, head, begin:upto, 0].long()
        members = list(listed.split(sizes))
        assert all((each[1:] > each[:-1]).all() for each in members), "tokens of a cluster are not in order of arrival"
    outside = torch.tensor([*range(begin), *range(max(begin, upto), length)], dtype=torch.int64)
    assert torch.cat((*members, outside)).sort().values.tolist() == list(range(length))
    return Clustering(members, outside)


def whole_clusters(heads: list[Head], room: int, found: Clustering, settings: dict[str, Any]) -> list[Tensor]:
    """Sinks and window; then clusters by q·centroid, whole, until `room` tokens are read, the last one trimmed."""
    chosen = []
    room = max(0, room - len(found.open))
    scores = []
    for head in heads:
        centroids = [head.key[members].mean(0) for members in found.members if len(members)]
        scores.append(head.logit(torch.stack(centroids) @ head.query) if centroids else torch.empty(0).double())
    filled = [members for members in found.members if len(members)]
    for by in rankings(scores, settings.get("select", "group")):
        ordered = [filled[which] for which in by.argsort(descending=True).tolist()]
        recalled = torch.cat(ordered)[:room] if ordered else torch.empty(0, dtype=torch.int64)
        chosen.append(torch.cat((found.open, recalled)))
    return chosen


def attend(head: Head, chosen: Tensor, found: Clustering, tail: bool) -> Tensor:
    """Exact attention to `chosen`; with a tail, each cluster's n - m tokens that were not read stand at its mean key
    and mean value, means over all n."""
    exact, values = head.logit(head.key[chosen] @ head.query), head.value[chosen]
    read = set(chosen.tolist())
    for members in found.members if tail else []:
        left = len(members) - len(read & set(members.tolist()))
        if left:
            logit = head.logit(head.key[members].mean(0) @ head.query) + torch.tensor(float(left)).log()
            exact, values = torch.cat((exact, logit[None])), torch.cat((values, head.value[members].mean(0)[None]))
    return head.softmax(exact) @ values


def expected(rows: Sequence[Row], spec: SoftmaxSpec, store: Store, rule: Rule, settings: dict[str, Any]) -> list[Step]:
    """What the store's last step should have given each row, `rows` in float64."""
    steps = []
    for index, row in enumerate(rows):
        tokens = store.lengths[index]
        output = torch.empty(row.query.shape[0], row.value.shape[-1], dtype=torch.float64)
        read = torch.zeros(row.query.shape[0], tokens, dtype=torch.bool)
        for kv_head in range(row.key.shape[0]):
            heads, found = heads_at(row, spec, kv_head, tokens), clustering_of(store, index, kv_head)
            room = budget({"keep": store.policy.settings.keep, **settings}, tokens)
            for head, chosen in zip(heads, rule(heads, room, found, settings), strict=True):
                read[head.index, chosen] = True
                output[head.index] = attend(head, chosen, found, settings.get("tail", False))
        steps.append(Step(output, read))
    return steps


def decode_checked(
    store: Store, rows: Sequence[Row], spec: SoftmaxSpec, rule: Rule, settings: dict[str, Any], steps: range
) -> None:
    """Decode; every step of every row equals its formula."""
    double = [row.double() for row in rows]
    for step in steps:
        output = store.attend(append(store, rows, step), spec)
        mask = store.read_mask()
        mask = mask.repeat_interleave(output.shape[1] // mask.shape[1], 1)
        for index, want in enumerate(expected(double, spec, store, rule, settings)):
            tokens = store.lengths[index]
            assert not mask[index, :, tokens:].any(), "tokens read that the row has not"
            assert_steps([Step(output[index, :, 0], mask[index, :, :tokens])], [want], rows[index].key.dtype)
