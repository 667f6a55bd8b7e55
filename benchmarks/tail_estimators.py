"""Other estimates of the tail than the one that the stores have, for `tail.py`.

All stand on exact top-k, whose choice of tokens does not depend on them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kvcal.runtime.attention import Logits
from kvcal.runtime.stores.clusters import Clusters
from kvcal.runtime.stores.exact_topk import ExactTopk, ExactTopkStore
from kvcal.runtime.stores.kmeans import sums_by_label
from kvcal.runtime.stores.selecting import Chosen
from kvcal.runtime.stores.tail import Remainder

RECENT = 64
"""Last queries of the prompt, whose mean stands for those to come."""
ESTIMATORS: dict[str, dict[str, Any]] = {
    "mean key, mean value (the stores')": {},
    "value mean under weights e^{q̄·k}": {"weighted": ("value",)},
    "the same, what was read taken out": {"weighted": ("value",), "value_out": 1.0},
    "both means under weights e^{q̄·k}": {"weighted": ("key", "value")},
    "logit + log mean e^{q̄·(k − k̄)}": {"offset": 1.0},
    "logit + half of that": {"offset": 0.5},
    "what was read taken out of the value mean": {"value_out": 1.0},
    "half of what was read taken out of both means": {"value_out": 0.5, "key_out": 0.5},
    "all out of the value mean, half out of the key mean": {"value_out": 1.0, "key_out": 0.5},
    "what was read taken out of both means": {"value_out": 1.0, "key_out": 1.0},
    "+ 0.1 of the second order": {"second_order": 0.1},
    "+ 0.2 of the second order": {"second_order": 0.2},
    "+ the whole second order": {"second_order": 1.0},
    "8-bit means": {"bits": 8},
    "4-bit means": {"bits": 4},
    "3-bit means": {"bits": 3},
    "clusters of 32": {"tokens_per_cluster": 32},
    "clusters of 8": {"tokens_per_cluster": 8},
    "clusters of 8, 8-bit means": {"tokens_per_cluster": 8, "bits": 8},
    "clusters of 4, 4-bit means": {"tokens_per_cluster": 4, "bits": 4},
    "8-bit means, half of what was read taken out of both": {"bits": 8, "value_out": 0.5, "key_out": 0.5},
}


class Estimator(ExactTopkStore):
    weighted: Sequence[str] = ()
    """Means that are taken under the weights e^{q̄·k}, q̄ the mean query of the head group."""
    offset = 0.0
    """Share of log mean e^{q̄·(k − k̄)} that is added to a cluster's logit."""
    value_out = key_out = 0.0
    """Share of what was read by which a mean moves to that of what was not."""
    second_order = 0.0
    """Share of ½ qᵀΣq, Σ the covariance of keys within their clusters, pooled over a head's clusters."""
    bits = 16

    def __init__(self, selection: ExactTopk, queries: Tensor, scaling: float, attributes: Mapping[str, Any]):
        """Args: queries: [B, Hq, T, D] of the prompt."""
        super().__init__(selection)
        self._queries, self._scaling = queries, scaling
        for name, value in attributes.items():
            assert hasattr(type(self), name), name
            setattr(self, name, value)

    def _close(self, clusters: Clusters, slots: list[range]) -> None:
        super()._close(clusters, slots)
        key, value = (self.rows[name].view for name in ("key", "value"))
        owner = self.rows["cluster.of"].view.squeeze(-1).long()
        count = owner.shape[2]
        held = ~clusters.leave_out(torch.arange(count).expand(owner.shape[0], 1, -1))
        query = self._queries[:, :, -RECENT:].mean(2).unflatten(1, (key.shape[1], -1)).mean(2)
        expected = torch.einsum("bhd,bhsd->bhs", query, key[:, :, :count]).mul(self._scaling)
        weight = (expected - expected.amax(-1, keepdim=True)).double().exp().unsqueeze(-1)
        sums = [
            _sums(tokens, owner, held, clusters.sizes.shape[-1])
            for tokens in (weight, weight * key[:, :, :count], weight * value[:, :, :count])
        ]
        alike = torch.ones_like(weight), clusters.sizes.unsqueeze(-1).double()
        self._weights, self._totals = (weight, sums[0]) if self.weighted else alike
        at_mean = torch.einsum("bhd,bhcd->bhc", query, clusters.keys).mul(self._scaling)
        self._offset = (sums[0].squeeze(-1) / clusters.sizes).log() + expected.amax(-1, keepdim=True) - at_mean
        for name, of_name in (("key", sums[1]), ("value", sums[2])):
            mean = self.rows[f"cluster.{name}"].view
            if name in self.weighted:
                mean.copy_(of_name / sums[0])
            if self.bits < 16:
                mean.copy_(rounded(mean, self.bits))

    def _rest(self, query: Tensor, logits: Logits, own: Tensor, chosen: Chosen) -> Remainder | None:
        clusters, grouped = self.clusters, self._grouped(query)
        assert clusters and self.tail
        counted = self._clustered(chosen, clusters)
        keys = clusters.keys.unsqueeze(2)
        if self.key_out:
            keys = self._left(clusters.keys, "key", self.key_out, chosen, counted)
        means = logits.of((keys @ grouped.unsqueeze(-1)).squeeze(-1))
        if self.offset:
            means = means + self.offset * self._offset.float().unsqueeze(2)
        if self.second_order:
            spread = torch.einsum("bhgd,bhde,bhge->bhg", grouped, self._covariance(clusters), grouped)
            means = means + 0.5 * self.second_order * (spread * logits.scaling**2).unsqueeze(-1)
        if self.value_out:
            self._values = self._left(clusters.values, "value", self.value_out, chosen, counted)
        self._owners = chosen.index.numel()
        return self.tail.remainder(means, chosen.index, counted)

    def _weigh(
        self, query: Tensor, logits: Logits, exact: Tensor, value: Tensor, chosen: Chosen, rest: Remainder | None
    ) -> Tensor:
        out = super()._weigh(query, logits, exact, value, chosen, rest)
        if not self.value_out or rest is None:
            return out
        if chosen.counted is not None:
            exact = exact.masked_fill(~chosen.counted, -torch.inf)
        weights = logits.softmax(torch.cat((exact, rest.logits), -1))[..., exact.shape[-1] :]
        moved = self._values - rest.values.unsqueeze(2)
        return out + (weights.unsqueeze(3) @ moved).flatten(1, 2)

    def _left(self, mean: Tensor, name: str, share: float, chosen: Chosen, counted: Tensor) -> Tensor:
        """[B, Hkv, G, C, D]: means [B, Hkv, C, D], moved by `share` to the mean of what was not read."""
        of, rows = self.rows["cluster.of"].view, self.rows[name].view
        batch, heads = torch.arange(of.shape[0]).view(-1, 1, 1, 1), torch.arange(of.shape[1]).view(1, -1, 1, 1)
        slot = chosen.index.clamp_max(of.shape[2] - 1)
        owner, held = of[batch, heads, slot].squeeze(-1).long().flatten(1, 2), counted.flatten(1, 2)
        weight = self._weights[batch, heads, slot].flatten(1, 2)
        tokens = rows[batch, heads, slot].flatten(1, 2)
        read, read_weight = (
            _sums(part, owner, held, mean.shape[2]).unflatten(1, (of.shape[1], -1))
            for part in (weight * tokens, weight)
        )
        total = self._totals.unsqueeze(2)
        # (W k̄ − Σ_read w k) / (W − Σ_read w) − k̄; where nothing is left it does not matter.
        left = (total - read_weight).clamp_min(1e-6 * total)
        return mean.unsqueeze(2) + share * ((read_weight * mean.unsqueeze(2) - read) / left).float()

    def _covariance(self, clusters: Clusters) -> Tensor:
        key, of = self.rows["key"].view, self.rows["cluster.of"].view.long()
        centred = key[:, :, : of.shape[2]] - clusters.keys.gather(2, of.clamp_min(0).expand(-1, -1, -1, key.shape[3]))
        centred = centred[:, :, self.selection.sinks :]
        return centred.mT @ centred / centred.shape[2]

    def tail_share(self) -> float:
        """What the last step read for the tail over what dense attention reads, keys and values of 16 bits.

        Keys and values of the tokens that are read are there anyway.
        """
        assert self.clusters
        batch, heads, tokens, dims = self.rows["key"].view.shape
        both = dims + self.rows["value"].view.shape[3]
        of_cluster = both * self.bits / 8 + 4 + (2 * 2 if self.bits < 16 else 0) + (2 if self.offset else 0)
        of_head = dims * (dims + 1) / 2 * 2 if self.second_order else 0.0
        clusters = self.clusters.sizes.shape[-1]
        means = batch * heads * (clusters * of_cluster + of_head)
        return (means + 4 * self._owners) / (batch * heads * tokens * both * 2)


def rounded(tensor: Tensor, bits: int) -> Tensor:
    """Symmetric rounding with one scale per row of D numbers."""
    largest = 2 ** (bits - 1) - 1
    scale = tensor.abs().amax(-1, keepdim=True) / largest
    return (tensor / scale).round().clamp(-largest - 1, largest) * scale


def _sums(values: Tensor, labels: Tensor, held: Tensor, count: int) -> Tensor:
    """[B, H, count, D] as `sums_by_label`."""
    return sums_by_label(values, labels, held.expand(labels.shape), count)
