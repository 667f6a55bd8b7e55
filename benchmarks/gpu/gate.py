"""Whether the kernels are right at realistic shapes on this device; checks.py lists all checks.

append, score and cluster against float64; gate_select.py and gate_attention.py have the others.
What must not be read or written is NaN, or a number that nothing else is.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from sizes import Sizes
from torch import Tensor

from kvcal.kernels.append import append
from kvcal.kernels.cluster import assign, update
from kvcal.kernels.score import quantize, score, unpack

LARGEST = {8: 127, 4: 7, 2: 1.5}


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
    batch, heads, dims, rank, capacity = 3, sizes.heads, sizes.dims, sizes.rank, sizes.gate
    key_new, value_new = gate.normal(batch, heads, dims), gate.normal(batch, heads, dims)
    map = gate.normal(heads, rank, dims) / dims**0.5
    lengths = gate.integers(capacity - 1, capacity // 2, capacity // 3)
    active = torch.tensor([True, True, False], device=gate.device)
    projected = torch.einsum("hrd,bhd->bhr", map.double(), key_new.double())
    for bits in (16, 8, 4, 2):
        key, value = gate.nan(batch, heads, capacity, dims), gate.nan(batch, heads, capacity, dims)
        codes, scales = quantize(torch.zeros(batch, heads, capacity, rank, dtype=sizes.dtype, device=gate.device), bits)
        append(key_new, value_new, map, key, value, codes, scales, lengths, active, bits=bits, backend=gate.backend)
        expected_key, expected_value = torch.full_like(key, torch.nan), torch.full_like(value, torch.nan)
        held = []
        for row in range(2):
            slot = int(lengths[row])
            expected_key[row, :, slot], expected_value[row, :, slot] = key_new[row], value_new[row]
            scale = 1.0 if scales is None else scales[row, :, slot].double().unsqueeze(-1)
            held.append(unpack(codes[row, :, slot], bits).double() * scale)
        gate.same(f"append {bits}: keys", key, expected_key)
        gate.same(f"append {bits}: values", value, expected_value)
        if scales is None:
            gate.near("append 16: index", torch.stack(held), projected[:2], 5e-3)
        else:
            # Half a code, and what the rounding of the scale to 11 bits adds to the largest ones.
            step = projected[:2].abs().amax(-1, keepdim=True) / LARGEST[bits]
            worst = ((torch.stack(held) - projected[:2]) / step).abs().max()
            gate.at_most(f"append {bits}: index, in codes", float(worst), 0.501 + LARGEST[bits] * 2**-11)


def check_score(gate: Gate) -> None:
    sizes = gate.sizes
    for bits, combine, out_dtype, capacity in (
        (16, "max", torch.float16, sizes.gate),
        (16, "none", torch.float32, sizes.gate),
        (8, "max", torch.float16, sizes.gate),
        (4, "max", torch.float16, sizes.gate_long),
        (4, "none", torch.float32, sizes.gate + 3),
        (2, "max", torch.float16, sizes.gate_long),
        (2, "none", torch.float32, sizes.gate + 3),
    ):
        lengths = gate.integers(capacity, capacity // 2 + 13, 1)
        query = gate.normal(3, sizes.heads, sizes.group, sizes.rank)
        codes, scales = quantize(gate.normal(3, sizes.heads, capacity, sizes.rank), bits)
        shape = (sizes.group,) if combine == "none" else ()
        out = gate.nan(3, sizes.heads, *shape, capacity, dtype=out_dtype)
        options: dict[str, Any] = {"bits": bits, "combine": combine, "softcap": 30.0 if bits == 8 else None}
        score(
            query, codes, scales, lengths, scaling=sizes.scaling, out=out, out_dtype=out_dtype,
            backend=gate.backend, **options,
        )  # fmt: skip
        exact = sizes.scaling * query.double() @ unpack(codes, bits).double().mT
        exact = exact if scales is None else exact * scales.double().unsqueeze(2)
        exact = 30 * torch.tanh(exact / 30) if bits == 8 else exact
        exact = exact.amax(2) if combine == "max" else exact
        beyond = torch.arange(capacity, device=gate.device) >= lengths.view(-1, *[1] * (exact.dim() - 1))
        name = f"score {bits} {combine} of {capacity}"
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
