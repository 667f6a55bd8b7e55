"""The gate's other half: attention kernels against one softmax in float64, and whole steps against their references."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvcal.kernels.attend import attend
from kvcal.kernels.dense import dense

from .attention_steps import methods
from .caches import draw, forced
from .gate import Gate
from .timing import captured

ALLOWED = 1e-2
"""bfloat16 operands and results."""
STEP_ALLOWED = 3e-2
"""Of whole steps beside float32's, in the median of the query heads: tokens and clusters whose scores are nearly
those of others may be chosen in their place."""
SHARPER = 4.0
"""Times the queries of whole steps, so that what is barely chosen has little weight."""
CAP = 20.0


class Problem:
    """Three sequences of unequal lengths; `hide` spoils what no query sees."""

    def __init__(self, gate: Gate, capacity: int):
        sizes = gate.sizes
        self.gate, self.capacity = gate, capacity
        self.lengths = gate.integers(capacity, capacity // 2 + 13, 1)
        self.query = 2 * gate.normal(3, sizes.heads, sizes.group, sizes.dims)
        self.key, self.value = (gate.normal(3, sizes.heads, capacity, sizes.dims) for _ in "kv")
        self.sink_logits = gate.normal(sizes.heads * sizes.group, dtype=torch.float32)
        self.slot = torch.arange(capacity, device=gate.device)
        self.held = self.slot < self.lengths.view(-1, 1, 1, 1)

    def hide(self, visible: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, NaN where no query sees them.

        Args:
            visible: [B, Hkv, G or 1, S].
        """
        unseen = ~visible.any(2).unsqueeze(-1)
        return self.key.masked_fill(unseen, torch.nan), self.value.masked_fill(unseen, torch.nan)

    def exact(self, visible: Tensor, softcap: float | None = None, sink_logits: Tensor | None = None) -> Tensor:
        """[B, Hkv, G, Dv] float64."""
        logits = self.query.double() @ self.key.double().mT * self.gate.sizes.scaling
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        logits = logits.masked_fill(~visible, -torch.inf)
        if sink_logits is not None:
            extra = sink_logits.double().view(1, logits.shape[1], -1, 1).expand(len(logits), -1, -1, -1)
            logits = torch.cat((logits, extra), -1)
        weights = logits.softmax(-1)[..., : self.capacity]
        return weights @ self.value.double()

    def out(self) -> Tensor:
        return torch.full_like(self.query, torch.nan)


def check_dense(gate: Gate) -> None:
    for capacity in (gate.sizes.gate, gate.sizes.gate_long):
        problem = Problem(gate, capacity)
        key, value = problem.hide(problem.held)
        cases: dict[str, dict[str, Any]] = {
            "plain": {},
            "capped, sink logits": {"softcap": CAP, "sink_logits": problem.sink_logits},
        }
        for name, options in cases.items():
            out = problem.out()
            dense(
                problem.query,
                key,
                value,
                problem.lengths,
                scaling=gate.sizes.scaling,
                out=out,
                backend=gate.backend,
                **options,
            )
            gate.near(f"dense {name} of {capacity}", out, problem.exact(problem.held, **options), ALLOWED)


def check_attend(gate: Gate) -> None:
    sizes, problem = gate.sizes, Problem(gate, gate.sizes.gate)
    keep = min(sizes.keep, problem.capacity // 4)
    common: dict[str, Any] = {"scaling": sizes.scaling, "backend": gate.backend}
    for name, by_query in (("by KV head", False), ("by query head", True)):
        group = sizes.group if by_query else 1
        rank = torch.rand(3, sizes.heads, group, problem.capacity, generator=gate.generator, device=gate.device)
        rank = rank.masked_fill(~problem.held, -1.0)
        index = rank.topk(keep).indices.int()
        wanted = (keep - torch.arange(sizes.heads * group, device=gate.device) % 17).view(sizes.heads, group)
        count = torch.minimum(wanted, (rank >= 0).sum(-1)).int()
        counted = torch.arange(keep, device=gate.device) < count.unsqueeze(-1)
        visible = torch.zeros_like(rank, dtype=torch.int32).scatter_add_(3, index.long(), counted.int()) > 0
        index = index.where(counted, 0)
        if not by_query:
            index, count = index.squeeze(2), count.squeeze(2)
        key, value = problem.hide(visible)
        out = problem.out()
        attend(problem.query, key, value, index, count, out=out, **common)
        gate.near(f"attend {name}", out, problem.exact(visible).where(visible.any(-1, keepdim=True), 0), ALLOWED)
        out = problem.out()
        attend(problem.query, key, value, index, count, softcap=CAP, sink_logits=problem.sink_logits, out=out, **common)
        gate.near(f"attend {name}, capped, sink logits", out, problem.exact(visible, CAP, problem.sink_logits), ALLOWED)


def check_step(gate: Gate, method: str) -> None:
    """A whole step, run and replayed, beside float32's on the references."""
    sizes, make = gate.sizes, methods(gate.sizes)[method]
    copy = draw(sizes, 2, sizes.gate, gate.device, seed=3)
    copy = replace(copy, query=SHARPER * copy.query)
    with forced("reference"):
        expected = make(copy.float()).step()
    with forced(gate.backend):
        step = make(copy).step
        out = step()
    errors = (out.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    gate.at_most("step", float(errors.median()), STEP_ALLOWED)
    if gate.device.type == "cuda":
        again = torch.full_like(out, torch.nan)
        graph = captured([lambda: again.copy_(step())])
        again.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        gate.near("step, captured", again, out, ALLOWED)
