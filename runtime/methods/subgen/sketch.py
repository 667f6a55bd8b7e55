"""SubGen's sketch (Zandieh, Han, Mirrokni, Karbasi 2024, algorithm 1): what is kept of evicted tokens.

Per (sequence, KV head): online clusters of keys for the softmax normaliser, each with its count and a few uniform
samples of its members, and for the numerator samples of (key, value) drawn in proportion to ‖value‖². Tokens come in
blocks; the result is that of one token at a time, whatever the blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...kv.buffers import TokenBuffer
from ...kv.saved import Saved, require
from ..base import SequenceIndex
from .counters import uniform
from .merging import merge

BLOCK = 256
"""Tokens that enter the sketch at once, at most."""
CHUNK = 16
"""Clusters by which buffers grow."""
_NUMBERS = 1 << 23
"""Random numbers, or distances, that are computed at a time."""
PREFIX = "sketch."
"""Begins the names of a sketch's tensors in caches and files."""
MEMBERS, VALUES, MERGES = range(3)
"""Streams of random numbers."""


@dataclass(frozen=True)
class Shape:
    """What a sketch may hold."""

    clusters: int
    """Most clusters: with one more, delta grows until merging brings them down to this. 0: no clusters are kept."""
    growth: float
    """Factor on delta at each growth."""
    members: int
    """Uniform samples of keys per cluster, the paper's t."""
    values: int
    """Samples of (key, value), the paper's s."""
    seed: int


class Sketch(SequenceIndex):
    """What is kept of the tokens that have left their windows; no tensors before the first has.

    representative [B, H, C, D]: the key that opened the cluster. sample [B, H, C, t, D]: samples of its members' keys.
    count [B, H, C] int32: how many members; 0 beyond `active`. active [B, H] int64: how many clusters.
    delta [B, H] float64: how near to its representative a key has to be; 0: only equal keys share a cluster yet.
    value_key [B, H, s, D], value [B, H, s, Dv]: sampled tokens. mass [B, H] float64: Σ‖v‖² over all tokens.
    """

    def __init__(self, shape: Shape, delta: Tensor | float | None = None):
        """
        Args:
            delta: the initial one, [Hkv] or one for all heads; None: 0.
        """
        self.shape, self.delta = shape, delta
        self.parts: dict[str, Tensor] = {}
        """The tensors above, by name."""

    def _start(self, key: Tensor, value: Tensor) -> None:
        """Make empty tensors, for tokens like these [B, H, …, D | Dv]."""
        batch, heads = key.shape[:2]
        size = (batch, heads, self.shape.values)
        self.parts = {
            "value_key": key.new_zeros(*size, key.shape[-1]),
            "value": value.new_zeros(*size, value.shape[-1]),
            "mass": torch.zeros(batch, heads, dtype=torch.float64, device=key.device),
        }
        if not self.shape.clusters:
            return
        start = 0.0 if self.delta is None else self.delta
        self.parts |= {
            "delta": torch.as_tensor(start, dtype=torch.float64, device=key.device).expand(batch, heads).clone(),
            "active": torch.zeros(batch, heads, dtype=torch.int64, device=key.device),
            "representative": key.new_zeros(batch, heads, 0, key.shape[-1]),
            "sample": key.new_zeros(batch, heads, 0, self.shape.members, key.shape[-1]),
            "count": torch.zeros(batch, heads, 0, dtype=torch.int32, device=key.device),
        }

    def block(self, key: Tensor) -> int:
        """How many tokens of sequences and heads like these may enter at once."""
        shape = self.shape
        per_token = key.shape[0] * key.shape[1] * max(shape.values, shape.clusters, shape.members, key.shape[3])
        return max(1, min(BLOCK, _NUMBERS // per_token))

    def add(self, key: Tensor, value: Tensor, position: Tensor, mask: Tensor) -> None:
        """Take in a block of m tokens.

        Args:
            key, value: [B, H, m, D | Dv].
            position: [B or 1, m] int64, of each token in its sequence; with the seed it decides the random numbers.
            mask: [B, m] bool, which tokens count.
        """
        if not self.parts:
            self._start(key, value)
        if self.shape.clusters:
            self._cluster(key, position, mask)
        draws = self._draws(VALUES, position.unsqueeze(1), key.shape[1], self.shape.values)
        self._sample_values(key, value, mask.unsqueeze(1), draws)

    def _cluster(self, key: Tensor, position: Tensor, mask: Tensor) -> None:
        heads = key.shape[1]
        pending = mask.unsqueeze(1).expand(-1, heads, -1)
        draws = self._draws(MEMBERS, position.unsqueeze(1), heads, self.shape.members)
        index = torch.arange(key.shape[2], device=key.device)
        while True:
            labels, last = self._assign(key, pending)
            now = pending & (index <= last.unsqueeze(-1))
            self._sample_members(key, labels, now, draws)
            over = self.parts["active"] > self.shape.clusters
            if not bool(over.any()):
                return
            last_position = (
                position.unsqueeze(1).expand(key.shape[0], heads, -1).gather(2, last.unsqueeze(-1)).squeeze(-1)
            )
            draw = partial(self._merge_draws, last_position)
            merge(self.parts, over, self.shape.clusters, self.shape.growth, draw)
            pending = pending & ~now

    def _assign(self, key: Tensor, pending: Tensor) -> tuple[Tensor, Tensor]:
        """([B, H, m] the cluster of each pending token, [B, H] the last token for which that holds).

        Opens the clusters that the tokens open one after the other: the first one farther than delta from every
        representative opens one, then the first that is still too far, until all are near one. Ends early, for a
        sequence and head, with the token that opens one cluster too many.
        """
        parts = self.parts
        delta = parts["delta"].unsqueeze(-1)
        index = torch.arange(key.shape[2], device=key.device)
        best, labels = self._nearest(key)
        last = torch.full(key.shape[:2], key.shape[2] - 1, device=key.device)
        far = pending & (best > delta)
        while bool(far.any()):
            opens, first = far.any(-1), far.int().argmax(-1)
            number = parts["active"].clone()
            self._reserve(int(number[opens].max()) + 1)
            centre = key.gather(2, first[:, :, None, None].expand(-1, -1, 1, key.shape[-1]))
            sequence, head = opens.nonzero(as_tuple=True)
            parts["representative"][sequence, head, number[sequence, head]] = centre[sequence, head, 0]
            parts["active"] += opens
            distance = distances(key, centre).squeeze(-1)
            nearer = opens.unsqueeze(-1) & (index >= first.unsqueeze(-1)) & (distance < best)
            best = torch.where(nearer, distance, best)
            labels = torch.where(nearer, number.unsqueeze(-1), labels)
            last = torch.where(opens & (parts["active"] > self.shape.clusters), first, last)
            far = pending & (best > delta) & (index <= last.unsqueeze(-1))
        return labels, last

    def _nearest(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """([B, H, m] distance to the nearest representative, infinity where there is none; [B, H, m] its cluster)."""
        representative, active = self.parts["representative"], self.parts["active"]
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

        Args:
            draws: [B or 1, H, m, t].
        """
        count, sample = self.parts["count"], self.parts["sample"]
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
        sequence, head, place = winner.nonzero(as_tuple=True)
        sample.flatten(2, 3)[sequence, head, place] = key[sequence, head, winner[sequence, head, place] - 1]
        count.copy_(members[:, :, -1])

    def _sample_values(self, key: Tensor, value: Tensor, mask: Tensor, draws: Tensor) -> None:
        """A token replaces each sample with probability ‖v‖² / Σ‖v‖², itself included.

        Args:
            draws: [B or 1, H, m, s].
        """
        weight = value.double().square().sum(-1) * mask
        total = torch.cat((self.parts["mass"].unsqueeze(-1), weight), -1).cumsum(-1)
        self.parts["mass"] = total[..., -1].clone()
        accepted = draws * total[..., 1:].unsqueeze(-1) < weight.unsqueeze(-1)
        order = torch.arange(1, key.shape[2] + 1, device=key.device).unsqueeze(-1) * accepted
        winner = order.amax(2)
        sequence, head, slot = winner.nonzero(as_tuple=True)
        for name, tokens in (("value_key", key), ("value", value)):
            self.parts[name][sequence, head, slot] = tokens[sequence, head, winner[sequence, head, slot] - 1]

    def _merge_draws(self, position: Tensor, rounds: int) -> Tensor:
        """[B, H, C + 1, t] for merging when delta grows for the `rounds`-th time at the tokens `position` [B, H]."""
        clusters, slots = self.shape.clusters + 1, self.shape.members
        drawn = self._draws(MERGES + rounds, position.unsqueeze(-1), position.shape[1], clusters * slots)
        return drawn.squeeze(2).unflatten(-1, (clusters, slots))

    def _draws(self, stream: int, position: Tensor, heads: int, slots: int) -> Tensor:
        """[B, H, m, slots] random numbers for `position` [B, 1 or H, m]."""
        head = torch.arange(heads, device=position.device).unsqueeze(-1)
        return uniform(self.shape.seed, stream, position, head, slots)

    def _reserve(self, clusters: int) -> None:
        capacity = self.parts["count"].shape[2]
        if clusters <= capacity:
            return
        size = min(-(-clusters // CHUNK) * CHUNK, self.shape.clusters + 1)
        for name in ("representative", "sample", "count"):
            old = self.parts[name]
            grown = old.new_zeros(*old.shape[:2], size, *old.shape[3:])
            grown[:, :, :capacity] = old
            self.parts[name] = grown

    # As a sequence index

    def reorder(self, order: Tensor) -> None:
        self.parts = {name: tensor.index_select(0, order.to(tensor.device)) for name, tensor in self.parts.items()}

    def to(self, device: torch.device | str) -> None:
        self.parts = {name: tensor.to(device, non_blocking=True) for name, tensor in self.parts.items()}

    def tensors(self) -> dict[str, Tensor]:
        return {f"{PREFIX}{name}": tensor for name, tensor in self.parts.items()}

    def entries(self) -> int:
        """How many clusters there is room for."""
        return self.parts["count"].shape[0] * self.parts["count"].shape[2] if "count" in self.parts else 0

    def state(self) -> dict[str, Tensor]:
        return self.tensors()

    def restore(self, state: Mapping[str, Tensor], buffers: Mapping[str, TokenBuffer]) -> None:
        self.parts = {name.removeprefix(PREFIX): tensor for name, tensor in state.items() if name.startswith(PREFIX)}

    def check(self, saved: Saved) -> None:
        """Checks that counts and shapes are those of a sketch of just the tokens that are not held."""
        evicted = [length - held for length, held in zip(saved.lengths, saved.held, strict=True)]
        if not any(evicted) and not saved.has("sketch.mass"):
            return
        key, value, shape = saved.key, saved.value, self.shape
        batch, heads = key.shape[:2]
        saved.take("sketch.value_key", key.dtype, batch, heads, shape.values, key.shape[3])
        saved.take("sketch.value", value.dtype, batch, heads, shape.values, value.shape[3])
        mass = saved.take("sketch.mass", torch.float64, batch, heads)
        gone = torch.tensor(evicted).unsqueeze(1)
        require("mass", (mass >= 0) & ((mass == 0) | (gone > 0)), "the squared norms of what has left")
        if not shape.clusters:
            return
        count = saved.take("sketch.count", torch.int32, batch, heads, None)
        clusters = count.shape[2]
        require("count", torch.tensor(clusters <= shape.clusters + 1), f"at most {shape.clusters + 1} clusters")
        active = saved.take("sketch.active", torch.int64, batch, heads)
        require("active", (active >= 0) & (active <= min(clusters, shape.clusters)), "how many clusters there are")
        cluster_mask = torch.arange(clusters) < active.unsqueeze(-1)
        require("count", (count > 0) == cluster_mask, "members of those that there are, and of no others")
        require("count (summed up)", count.long().sum(-1) == gone, "the tokens that have left")
        delta = saved.take("sketch.delta", torch.float64, batch, heads)
        require("delta", delta >= 0, "a distance")
        saved.take("sketch.representative", key.dtype, batch, heads, clusters, key.shape[3])
        saved.take("sketch.sample", key.dtype, batch, heads, clusters, shape.members, key.shape[3])


def distances(key: Tensor, other: Tensor) -> Tensor:
    """[B, H, m, n] float64 L2, from differences, so that a pair's distance does not depend on the other pairs."""
    dtype = torch.promote_types(key.dtype, torch.float32)
    return torch.cdist(key.to(dtype), other.to(dtype), compute_mode="donot_use_mm_for_euclid_dist").double()
