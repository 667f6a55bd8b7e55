"""Whether the kernels are right at realistic shapes on this device; checks.py lists all checks.

append, score and cluster against float64; gate_select.py and gate_attention.py have the others.
What must not be read or written is NaN, or a number that nothing else is.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcal.kernels.append import append
from kvcal.kernels.cluster import assign, update
from kvcal.kernels.score import score

from .sizes import Sizes


class Gate:
    """Collects {"check", "error", "allowed", "passed"}."""

    def __init__(self, sizes: Sizes, device: torch.device, backend: str):
        self.sizes, self.device, self.backend = sizes, device, backend
        self.generator = torch.Generator(device).manual_seed(11)
        self.found: list[dict[str, Any]] = []

    def near(self, check: str, out: Tensor, expected: Tensor, allowed: float) -> None:
        """‖out − expected‖ / ‖expected‖; infinities have to be where they are expected, and NaN passes nowhere."""
        out, expected = out.double(), expected.double()
        finite = expected.isfinite()
        alike = torch.equal(out.where(~finite, 0.0), expected.where(~finite, 0.0))
        error = (out - expected).where(finite, 0.0).norm() / expected.where(finite, 0.0).norm().clamp_min(1e-30)
        self.at_most(check, float(error) if alike else float("inf"), allowed)

    def same(self, check: str, out: Tensor, expected: Tensor) -> None:
        """The share of entries that differ, none of which may; NaN is like NaN."""
        differing = (out != expected) & ~((out != out) & (expected != expected))
        self.at_most(check, float(differing.double().mean()), 0.0)

    def at_most(self, check: str, error: float, allowed: float) -> None:
        """`error` is None where it is no number, which JSON has no word for and which never passes."""
        number = error if math.isfinite(error) else None
        self.found.append({"check": check, "error": number, "allowed": allowed, "passed": error <= allowed})

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).to(dtype or self.sizes.dtype)

    def integers(self, *numbers: int) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=self.device)

    def nan(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.full(shape, torch.nan, dtype=dtype or self.sizes.dtype, device=self.device)


def check_append(gate: Gate) -> None:
    sizes = gate.sizes
    batch, heads, dims, capacity = 3, sizes.heads, sizes.dims, sizes.gate
    key_new, value_new = gate.normal(batch, heads, dims), gate.normal(batch, heads, dims)
    lengths = gate.integers(capacity - 1, 5, capacity)  # the last sequence is full
    key, value = gate.nan(batch, heads, capacity, dims), gate.nan(batch, heads, capacity, dims)
    append(key_new, value_new, key, value, lengths, backend=gate.backend)
    expected_key, expected_value = torch.full_like(key, torch.nan), torch.full_like(value, torch.nan)
    for sequence in range(2):
        slot = int(lengths[sequence])
        expected_key[sequence, :, slot], expected_value[sequence, :, slot] = key_new[sequence], value_new[sequence]
    gate.same("append: keys", key, expected_key)
    gate.same("append: values", value, expected_value)


def check_score(gate: Gate) -> None:
    sizes = gate.sizes
    for capacity, softcap in ((sizes.gate_long, None), (sizes.gate, 30.0), (sizes.gate, None), (sizes.gate + 3, None)):
        lengths = gate.integers(capacity, capacity // 2 + 13, 1)
        query = gate.normal(3, sizes.heads, sizes.group, sizes.rank)
        key = gate.normal(3, sizes.heads, capacity, sizes.rank)
        exact = sizes.scaling * query.double() @ key.double().mT
        exact = exact if softcap is None else softcap * torch.tanh(exact / softcap)
        beyond = torch.arange(capacity, device=gate.device) >= lengths.view(-1, 1, 1, 1)
        out = gate.nan(3, sizes.heads, sizes.group, capacity, dtype=torch.float32)
        score(query, key, lengths, scaling=sizes.scaling, softcap=softcap, out=out, backend=gate.backend)
        name = f"score of {capacity}" if softcap is None else f"score of {capacity}, capped"
        gate.near(name, out, exact.masked_fill(beyond, -torch.inf), 1e-3)


def check_cluster(gate: Gate) -> None:
    sizes, tokens = gate.sizes, gate.sizes.segment
    clusters = tokens // sizes.per_cluster[0]
    lengths, counts = gate.integers(tokens, tokens // 2 + 13), gate.integers(clusters, clusters // 2)
    unit = F.normalize(gate.normal(2, sizes.heads, tokens, sizes.dims, dtype=torch.float32), dim=-1)
    centroids = F.normalize(gate.normal(2, sizes.heads, clusters, sizes.dims, dtype=torch.float32), dim=-1)
    label, similarity = assign(unit, centroids, lengths, counts, backend=gate.backend)
    exact = unit.double() @ centroids.double().mT
    exact[1, :, :, clusters // 2 :] = -torch.inf
    held = torch.arange(tokens, device=gate.device) < lengths.view(-1, 1, 1)
    nearest = exact.amax(-1)
    of_label = exact.gather(-1, label.clamp_min(0).long().unsqueeze(-1)).squeeze(-1)
    gate.at_most("assign: similarity lost", float((nearest - of_label).where(held, 0).max()), 1e-5)
    gate.near("assign: similarity", similarity, nearest.where(held, 0), 1e-5)
    gate.same("assign: beyond", label.where(~held, -1), torch.full_like(label, -1))
    sums, members = update(unit, label, lengths, clusters, backend=gate.backend)
    chosen = F.one_hot(label.clamp_min(0).long(), clusters).double() * held.unsqueeze(-1)
    gate.near("update: sums", sums, chosen.mT @ unit.double(), 1e-5)
    gate.same("update: sizes", members, chosen.sum(2).to(members.dtype))
