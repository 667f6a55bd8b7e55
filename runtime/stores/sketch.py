"""SubGen's sketch (Zandieh, Han, Mirrokni, Karbasi 2024, algorithm 1): what is kept of tokens that are forgotten.

Per (row, KV head): online clusters of keys for the softmax normaliser, each with its count and a few uniform samples
of its members, and for the numerator samples of (key, value) drawn in proportion to ‖value‖². Tokens come in blocks;
the result is that of one token at a time, whatever the blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .counters import uniform
from .merging import merge

CHUNK = 16
"""Clusters by which buffers grow."""
MEMBERS, VALUES, MERGES = range(3)
"""Streams of random numbers."""


@dataclass(frozen=True)
class Shape:
    """What a sketch may hold."""

    clusters: int
    """Cap: one more, and delta grows until merging brings their number down to it. 0: no clusters are kept at all."""
    growth: float
    """Factor on delta then."""
    members: int
    """Uniform samples of keys per cluster, the paper's t."""
    values: int
    """Samples of (key, value), the paper's s."""
    seed: int


class Sketch:
    """Reads and writes `tensors`, whose owner may select rows of them, move and save them.

    representative [B, H, C, D]: the key that opened the cluster. sample [B, H, C, t, D]: of its members' keys.
    count [B, H, C] int32: members; clusters beyond `active` have none. active [B, H] int64: clusters.
    delta [B, H] float64: how near to its representative a key has to be; 0: only equal keys share a cluster yet.
    value_key [B, H, s, D], value [B, H, s, Dv]: sampled tokens. mass [B, H] float64: Σ‖v‖² over all tokens.
    """

    def __init__(self, tensors: dict[str, Tensor], shape: Shape):
        self.tensors, self.shape = tensors, shape

    def begin(self, key: Tensor, value: Tensor, delta: Tensor | None) -> None:
        """Empty, for tokens like these [B, H, …, D | Dv]. Args: delta: [H] to begin with; None: 0."""
        batch, heads = key.shape[:2]
        size = (batch, heads, self.shape.values)
        self.tensors |= {
            "value_key": key.new_zeros(*size, key.shape[-1]),
            "value": value.new_zeros(*size, value.shape[-1]),
            "mass": torch.zeros(batch, heads, dtype=torch.float64, device=key.device),
        }
        if not self.shape.clusters:
            return
        start = torch.zeros(heads) if delta is None else delta
        self.tensors |= {
            "delta": start.to(key.device, torch.float64).repeat(batch, 1),
            "active": torch.zeros(batch, heads, dtype=torch.int64, device=key.device),
            "representative": key.new_zeros(batch, heads, 0, key.shape[-1]),
            "sample": key.new_zeros(batch, heads, 0, self.shape.members, key.shape[-1]),
            "count": torch.zeros(batch, heads, 0, dtype=torch.int32, device=key.device),
        }

    def add(self, key: Tensor, value: Tensor, position: Tensor, there: Tensor) -> None:
        """Take in a block of m tokens.

        Args:
            key, value: [B, H, m, D | Dv].
            position: [B or 1, m] int64, of each token in its row; with the seed it decides the random numbers.
            there: [B, m] bool, which tokens count.
        """
        if self.shape.clusters:
            self._cluster(key, position, there)
        draws = self._draws(VALUES, position.unsqueeze(1), key.shape[1], self.shape.values)
        self._sample_values(key, value, there.unsqueeze(1), draws)

    def _cluster(self, key: Tensor, position: Tensor, there: Tensor) -> None:
        heads = key.shape[1]
        pending = there.unsqueeze(1).expand(-1, heads, -1)
        draws = self._draws(MEMBERS, position.unsqueeze(1), heads, self.shape.members)
        index = torch.arange(key.shape[2], device=key.device)
        while True:
            labels, last = self._assign(key, pending)
            now = pending & (index <= last.unsqueeze(-1))
            self._sample_members(key, labels, now, draws)
            over = self.tensors["active"] > self.shape.clusters
            if not bool(over.any()):
                return
            at = position.unsqueeze(1).expand(key.shape[0], heads, -1).gather(2, last.unsqueeze(-1)).squeeze(-1)
            draw = partial(self._merge_draws, at)
            merge(self.tensors, over, self.shape.clusters, self.shape.growth, draw)
            pending = pending & ~now

    def _assign(self, key: Tensor, pending: Tensor) -> tuple[Tensor, Tensor]:
        """([B, H, m] the cluster of each pending token, [B, H] the last token for which that holds).

        Opens the clusters that the tokens open one after the other: the first one farther than delta from every
        representative opens one, then the first of what is left, until all are near one. Ends early, for a row and
        head, with the token that opens one cluster too many.
        """
        tensors = self.tensors
        delta = tensors["delta"].unsqueeze(-1)
        index = torch.arange(key.shape[2], device=key.device)
        best, labels = self._nearest(key)
        last = torch.full(key.shape[:2], key.shape[2] - 1, device=key.device)
        far = pending & (best > delta)
        while bool(far.any()):
            opens, first = far.any(-1), far.int().argmax(-1)
            number = tensors["active"].clone()
            self._reserve(int(number[opens].max()) + 1)
            centre = key.gather(2, first[:, :, None, None].expand(-1, -1, 1, key.shape[-1]))
            row, head = opens.nonzero(as_tuple=True)
            tensors["representative"][row, head, number[row, head]] = centre[row, head, 0]
            tensors["active"] += opens
            distance = distances(key, centre).squeeze(-1)
            nearer = opens.unsqueeze(-1) & (index >= first.unsqueeze(-1)) & (distance < best)
            best = torch.where(nearer, distance, best)
            labels = torch.where(nearer, number.unsqueeze(-1), labels)
            last = torch.where(opens & (tensors["active"] > self.shape.clusters), first, last)
            far = pending & (best > delta) & (index <= last.unsqueeze(-1))
        return labels, last

    def _nearest(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """[B, H, m] distance to the nearest representative, infinity where there is none, and which it is."""
        representative, active = self.tensors["representative"], self.tensors["active"]
        if representative.shape[2] == 0:
            return torch.full(key.shape[:3], torch.inf, dtype=torch.float64, device=key.device), torch.zeros(
                key.shape[:3], dtype=torch.int64, device=key.device
            )
        vacant = torch.arange(representative.shape[2], device=key.device) >= active.unsqueeze(-1)
        distance = distances(key, representative).masked_fill(vacant.unsqueeze(2), torch.inf)
        labels = distance.argmin(-1)
        return distance.gather(-1, labels.unsqueeze(-1)).squeeze(-1), labels

    def _sample_members(self, key: Tensor, labels: Tensor, now: Tensor, draws: Tensor) -> None:
        """The n-th member of a cluster replaces each of its samples with probability 1/n.

        Args: draws: [B or 1, H, m, t].
        """
        count, sample = self.tensors["count"], self.tensors["sample"]
        clusters, slots = sample.shape[2:4]
        joins = torch.zeros(*labels.shape, clusters, dtype=torch.int32, device=key.device)
        joins.scatter_(3, labels.unsqueeze(-1), now.int().unsqueeze(-1))
        members = joins.cumsum(2) + count.unsqueeze(2)
        number = members.gather(3, labels.unsqueeze(-1))
        accepted = now.unsqueeze(-1) & (draws * number < 1)
        slot = labels.unsqueeze(-1) * slots + torch.arange(slots, device=key.device)
        order = torch.arange(1, key.shape[2] + 1, device=key.device).unsqueeze(-1) * accepted
        winner = torch.zeros(*labels.shape[:2], clusters * slots, dtype=torch.int64, device=key.device)
        winner.scatter_reduce_(2, slot.flatten(2), order.flatten(2), "amax")
        row, head, place = winner.nonzero(as_tuple=True)
        sample.flatten(2, 3)[row, head, place] = key[row, head, winner[row, head, place] - 1]
        count.copy_(members[:, :, -1])

    def _sample_values(self, key: Tensor, value: Tensor, there: Tensor, draws: Tensor) -> None:
        """A token replaces each sample with probability ‖v‖² / Σ‖v‖², itself included.

        Args: draws: [B or 1, H, m, s].
        """
        weight = value.double().square().sum(-1) * there
        total = torch.cat((self.tensors["mass"].unsqueeze(-1), weight), -1).cumsum(-1)
        self.tensors["mass"] = total[..., -1].clone()
        accepted = draws * total[..., 1:].unsqueeze(-1) < weight.unsqueeze(-1)
        order = torch.arange(1, key.shape[2] + 1, device=key.device).unsqueeze(-1) * accepted
        winner = order.amax(2)
        row, head, slot = winner.nonzero(as_tuple=True)
        for name, tokens in (("value_key", key), ("value", value)):
            self.tensors[name][row, head, slot] = tokens[row, head, winner[row, head, slot] - 1]

    def _merge_draws(self, at: Tensor, rounds: int) -> Tensor:
        """[B, H, C + 1, t] for merging in the `rounds`-th growth of delta at the tokens `at` [B, H]."""
        clusters, slots = self.shape.clusters + 1, self.shape.members
        drawn = self._draws(MERGES + rounds, at.unsqueeze(-1), at.shape[1], clusters * slots)
        return drawn.squeeze(2).unflatten(-1, (clusters, slots))

    def _draws(self, stream: int, position: Tensor, heads: int, slots: int) -> Tensor:
        """[B, H, m, slots] for `position` [B, 1 or H, m]."""
        head = torch.arange(heads, device=position.device).unsqueeze(-1)
        return uniform(self.shape.seed, stream, position, head, slots)

    def _reserve(self, clusters: int) -> None:
        capacity = self.tensors["count"].shape[2]
        if clusters <= capacity:
            return
        size = min(-(-clusters // CHUNK) * CHUNK, self.shape.clusters + 1)
        for name in ("representative", "sample", "count"):
            old = self.tensors[name]
            grown = old.new_zeros(*old.shape[:2], size, *old.shape[3:])
            grown[:, :, :capacity] = old
            self.tensors[name] = grown


def distances(key: Tensor, other: Tensor) -> Tensor:
    """[B, H, m, n] float64 L2. From differences, so that a pair's distance does not depend on what else is asked."""
    dtype = torch.promote_types(key.dtype, torch.float32)
    return torch.cdist(key.to(dtype), other.to(dtype), compute_mode="donot_use_mm_for_euclid_dist").double()
