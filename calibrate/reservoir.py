"""A bounded uniform sample of tokens, the same tokens for every layer and quantity.

Every token has a pseudo-random priority that depends on the seed and its index only; the sample is
the `capacity` tokens of lowest priority. So it does not depend on batch size, order, or how many
processes share the work, and two samples merge into the sample of the union.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..artifacts import Artifact


def priorities(tokens: Tensor, seed: int) -> Tensor:
    """[n] int64 pseudo-random priorities of token indices [n] (splitmix64, Steele et al. 2014)."""
    import numpy as np  # torch has no unsigned shifts

    with np.errstate(over="ignore"):
        mixed = tokens.cpu().numpy().astype(np.uint64) + np.uint64((seed * 0x9E3779B97F4A7C15 + 1) % 2**64)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        mixed ^= mixed >> np.uint64(31)
    return torch.from_numpy((mixed >> np.uint64(1)).astype(np.int64))


def sampled_tokens(artifact: Artifact) -> int:
    """Tokens in the reservoir, or in that which a slim artifact leaves out; 0 where there never was one."""
    if "reservoir" in artifact.stages:
        return len(artifact.stages["reservoir"].tensors["token"])
    stated = artifact.settings.get("reservoir")
    held = type(stated) is int and "reservoir" in artifact.left_out
    return int(min(stated, artifact.data["tokens_counted"])) if held else 0


@dataclass(frozen=True)
class Placement:
    """Which tokens of a batch enter the sample, and where."""

    rows: Tensor
    """[m] int64 indices into the batch's counted tokens."""
    slots: Tensor
    """[m] int64 slots that they take."""


class ReservoirSample:
    """Decides which tokens are in the sample; `SampledRows` holds their keys, queries or values."""

    def __init__(self, capacity: int, seed: int):
        self.capacity = capacity
        self.seed = seed
        self.token = torch.empty(0, dtype=torch.int64)
        """[N <= capacity] index of the token in each slot."""

    def place(self, tokens: Tensor) -> Placement:
        """Offer token indices [n], each at most once in a run; returns what to store where."""
        held = len(self.token)
        candidates = torch.cat([self.token, tokens.cpu()])
        if len(candidates) <= self.capacity:
            stay, enter = torch.arange(held), torch.arange(held, len(candidates))
        else:
            chosen = priorities(candidates, self.seed).argsort(stable=True)[: self.capacity].sort().values
            stay, enter = chosen[chosen < held], chosen[chosen >= held]
        freed = torch.ones(self.capacity, dtype=torch.bool)
        freed[stay] = False
        slots = freed.nonzero().flatten()[: len(enter)]
        self.token = torch.cat([self.token, torch.zeros(max(0, len(stay) + len(enter) - held), dtype=torch.int64)])
        self.token[slots] = candidates[enter]
        return Placement(enter - held, slots)

    def order(self) -> Tensor:
        """[N] slots in ascending order of their tokens: how the finished sample is stored."""
        return self.token.argsort()


class SampledRows:
    """The sampled rows [H, N, D] of one quantity of one layer, on the CPU, in the dtype they came in."""

    def __init__(self, capacity: int, heads: int, dim: int, dtype: torch.dtype):
        self.rows = torch.zeros(heads, capacity, dim, dtype=dtype)

    def update(self, samples: Tensor, placement: Placement) -> None:
        """Store the placed rows of a batch [H, n, D]."""
        self.rows[:, placement.slots] = samples[:, placement.rows.to(samples.device)].cpu()

    def finalize(self, order: Tensor) -> Tensor:
        """[H, N, D] in the given order of slots."""
        return self.rows[:, order].contiguous()
