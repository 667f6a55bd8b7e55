"""The gate of what only spectral launches: offsets, scores of runs, slots of the chosen, what clusters stand for."""

from __future__ import annotations

import torch
from gate import LARGEST, Gate
from torch import Tensor

from kvcal.kernels.append import append
from kvcal.kernels.attend import merge
from kvcal.kernels.remainder import chosen_slots, remainder
from kvcal.kernels.score import quantize, score_runs, unpack

ALLOWED = 2e-3
"""float16 scores and queries."""


def check_offset(gate: Gate) -> None:
    sizes = gate.sizes
    shape, capacity = (3, sizes.heads, sizes.dims), sizes.gate
    key_new, value_new = gate.normal(*shape), gate.normal(*shape)
    map, offset = (
        gate.normal(sizes.heads, sizes.rank, sizes.dims) / sizes.dims**0.5,
        3 * gate.normal(sizes.heads, sizes.rank, dtype=torch.float32),
    )
    projected = torch.einsum("hrd,bhd->bhr", map.double(), key_new.double()) - offset.double()
    lengths = gate.integers(capacity - 1, capacity // 2, 3)
    for bits in (8, 4, 2):
        caches = [gate.nan(3, sizes.heads, capacity, sizes.dims) for _ in "kv"]
        codes, scales = quantize(torch.zeros(3, sizes.heads, capacity, sizes.rank, device=gate.device), bits)
        total = gate.normal(*shape, dtype=torch.float32)
        before = total.clone()
        append(
            key_new, value_new, map, *caches, codes, scales, lengths, bits=bits, offset=offset, value_sum=total,
            summed_from=4, backend=gate.backend,
        )  # fmt: skip
        row = torch.arange(3, device=gate.device)
        assert scales is not None
        held = unpack(codes[row, :, lengths.long()], bits).double() * scales[row, :, lengths.long()].double().unsqueeze(
            -1
        )
        step = projected.abs().amax(-1, keepdim=True) / LARGEST[bits]
        worst = float(((held - projected) / step).abs().max())
        gate.at_most(f"append {bits} with an offset: index, in codes", worst, 0.501 + LARGEST[bits] * 2**-11)
        added = value_new.double().where((lengths >= 4).view(-1, 1, 1), 0)
        gate.near(f"append {bits}: sum of values", total, before.double() + added, 1e-6)


class Refined:
    """Clusters side by side after the first slots, of which a part is refined, then the open window."""

    def __init__(self, gate: Gate):
        sizes, self.rows = gate.sizes, 3
        self.capacity, self.sinks = sizes.gate_long, sizes.sinks
        clusters = (self.capacity - sizes.sinks - sizes.coded_window) // (2 * sizes.coded_per_cluster)
        pairs = self.rows, sizes.heads
        size = torch.randint(
            0, 2 * sizes.coded_per_cluster, (*pairs, clusters), generator=gate.generator, device=gate.device
        )
        refined = torch.rand(size.shape, generator=gate.generator, device=gate.device) < 0.125
        size[..., :2], refined[..., :2] = sizes.coded_per_cluster, True  # so that every head has something to choose
        filled = size * refined
        self.starts = (size.cumsum(-1) - size + sizes.sinks).int()
        self.ends, self.left = filled.cumsum(-1, dtype=torch.int32), (size - filled).float()
        self.begin = (size.sum(-1).amax(1) + sizes.sinks).int()
        self.end = self.begin + gate.integers(sizes.coded_window, 1, 0)
        # Heads differ in how many candidates they have, as they never do in a store.
        self.number = self.ends[..., -1] + (self.end - self.begin).unsqueeze(1)
        self.most = int(self.number.max()) + 5
        number = torch.arange(self.most, device=gate.device).expand(*pairs, -1)
        run = torch.searchsorted(self.ends, number.int().contiguous(), right=True)
        before = torch.cat((torch.zeros_like(self.ends[..., :1]), self.ends), -1).gather(-1, run)
        last = self.begin.view(-1, 1, 1).expand(-1, sizes.heads, 1)
        self.slots = torch.cat((self.starts, last), -1).gather(-1, run) + number - before
        self.there = number < self.number.unsqueeze(-1)
        self.owner = run


def check_score_runs(gate: Gate) -> None:
    sizes, of = gate.sizes, Refined(gate)
    query = gate.normal(of.rows, sizes.heads, sizes.group, sizes.rank, dtype=torch.float32)
    bias = 50 * gate.normal(of.rows, sizes.heads, sizes.group, dtype=torch.float32)
    for bits in (8, 4, 2):
        codes, scales = quantize(gate.normal(of.rows, sizes.heads, of.capacity, sizes.rank), bits)
        assert scales is not None
        out, best = score_runs(
            query, codes, scales, of.begin, of.end, capacity=of.most, scaling=sizes.scaling, bits=bits,
            starts=of.starts, ends=of.ends, bias=bias, combine="both", out_dtype=torch.float16, backend=gate.backend,
        )  # fmt: skip
        keys = unpack(codes, bits).double() * scales.double().unsqueeze(-1)
        slots = of.slots.where(of.there, 0).long().unsqueeze(-1).expand(-1, -1, -1, sizes.rank)
        exact = query.double() @ keys.gather(2, slots).mT + (bias - bias.amax(-1, keepdim=True)).double().unsqueeze(-1)
        exact = (sizes.scaling * exact).masked_fill(~of.there.unsqueeze(2), -torch.inf)
        assert out is not None and best is not None
        gate.near(f"score_runs {bits}", out, exact, ALLOWED)
        gate.near(f"score_runs {bits}, largest", best, exact.amax(2), ALLOWED)


def check_chosen_slots(gate: Gate) -> None:
    sizes, of = gate.sizes, Refined(gate)
    chosen = min(sizes.keep, int(of.number.min()))
    score = torch.rand(of.there.shape, generator=gate.generator, device=gate.device).where(of.there, -1.0)
    index = score.topk(chosen).indices.sort(-1).values
    count = gate.integers(*(chosen - pair % 7 for pair in range(of.rows * sizes.heads))).view(of.rows, sizes.heads)
    count = count.clamp_min(0)
    first, recent = gate.integers(sizes.sinks, 0, 2), of.end - gate.integers(9, 1, 0)
    scores = gate.normal(of.rows, sizes.heads, sizes.group, of.most, dtype=torch.float16)
    counted = torch.arange(chosen, device=gate.device) < count.unsqueeze(-1)
    taken = torch.zeros(of.there.shape, dtype=torch.int32, device=gate.device).scatter_add_(2, index, counted.int())
    expected = scores.masked_fill((taken > 0).unsqueeze(2), -torch.inf)
    slots, number = chosen_slots(
        index.int(), count, of.begin, first, recent, of.end, most_always=sizes.sinks + 9, starts=of.starts,
        ends=of.ends, scores=scores, backend=gate.backend,
    )  # fmt: skip
    listed = torch.zeros_like(slots)
    for row in range(of.rows):
        always = [*range(int(first[row])), *range(int(recent[row]), int(of.end[row]))]
        for head in range(sizes.heads):
            mine = of.slots[row, head, index[row, head, : int(count[row, head])]].int()
            both = torch.cat((torch.tensor(always, dtype=torch.int32, device=gate.device), mine))
            listed[row, head, : len(both)] = both
    gate.same("chosen_slots", slots, listed)
    gate.same("chosen_slots: count", number, count + (first + of.end - recent).unsqueeze(1))
    gate.same("chosen_slots: scores", scores, expected)


def check_remainder(gate: Gate) -> None:
    sizes, of = gate.sizes, Refined(gate)
    clusters, shape = of.ends.shape[-1], (of.rows, sizes.heads, sizes.group)
    scores = 2 * gate.normal(*shape, of.most, dtype=torch.float32)
    scores = scores.masked_fill(
        torch.rand(scores.shape, generator=gate.generator, device=gate.device) < 0.3, -torch.inf
    )
    scores = scores.masked_fill(~of.there.unsqueeze(2), -torch.inf).half()
    cluster_scores = gate.normal(*shape, clusters, dtype=torch.float16)
    value, value_scale = quantize(gate.normal(of.rows, sizes.heads, clusters, sizes.dims), 8)
    assert value_scale is not None
    open_sum, open_count = gate.normal(of.rows, sizes.heads, sizes.dims, dtype=torch.float32), gate.integers(64, 1, 0)
    bias, correction = gate.normal(*shape, dtype=torch.float32), gate.normal(sizes.heads, dtype=torch.float32)
    candidates = of.number.amax(1).int()
    part = remainder(
        scores, of.ends, candidates, value, value_scale, open_sum, open_count, left=of.left,
        cluster_scores=cluster_scores, bias=bias, correction=correction, scaling=sizes.scaling, backend=gate.backend,
    )  # fmt: skip
    mass = torch.zeros(*shape, clusters + 1, dtype=torch.float64, device=gate.device)
    mass.scatter_add_(-1, of.owner.unsqueeze(2).expand(*shape, -1), scores.double().exp())
    mass[..., :clusters] += of.left.double().unsqueeze(2) * cluster_scores.double().exp()
    means: Tensor = value.double() * value_scale.double().unsqueeze(-1)
    of_open = open_sum.double() / open_count.clamp_min(1).view(-1, 1, 1)
    exact = mass @ torch.cat((means, of_open.unsqueeze(2)), 2) / mass.sum(-1, keepdim=True)
    query = torch.zeros(*shape, sizes.dims, device=gate.device)
    gate.near("remainder", merge(query, [part], backend="reference"), exact, ALLOWED)
    shift = sizes.scaling * bias.double().amax(-1, keepdim=True) + correction.double().view(-1, 1)
    gate.near("remainder: mass", part[1].double().logsumexp(-1), mass.sum(-1).log() + shift, ALLOWED)
