"""The methods that evict tokens, written down from their papers; see `oracles`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from oracle_heads import budget, heads_at
from sequences import Row, Step
from torch import Tensor

from kvcal.runtime.attention import SoftmaxSpec


def empty_steps(row: Row) -> list[Step]:
    """Of every decoded token, to be filled in by head."""
    return [
        Step(
            torch.empty(row.query.shape[0], row.value.shape[-1], dtype=torch.float64),
            torch.zeros(row.query.shape[0], tokens, dtype=torch.bool),
        )
        for tokens in range(row.prompt + 1, row.key.shape[1] + 1)
    ]


def evicting(
    protect: Callable[[int, int, int, dict], bool],
    worth: Callable[[int, dict[int, float]], float],
    row: Row,
    spec: SoftmaxSpec,
    settings: dict,
) -> list[Step]:
    """The steps of a method that evicts: before each step the tokens of least worth go until k are left.

    Args:
        protect: (position, n, k, settings) -> whether it may not go.
        worth: (position, attention received so far by position).
    """
    row = row.double()
    steps = empty_steps(row)
    for kv_head in range(row.key.shape[0]):
        held = list(range(row.prompt))
        mass = dict(enumerate(prompt_mass(row, spec, kv_head).tolist()))
        for step, tokens in zip(steps, range(row.prompt + 1, row.key.shape[1] + 1), strict=True):
            k = budget(settings, tokens)
            held.append(tokens - 1)
            mass[tokens - 1] = 0.0
            while len(held) > k:
                may_go = [at for at in held[:-1] if not protect(at, tokens, k, settings)]
                held.remove(min(may_go, key=lambda at: worth(at, mass)))
            for head in heads_at(row, spec, kv_head, tokens):
                step.output[head.index], step.read[head.index, held] = head.attend(torch.tensor(held)), True
                for at, weight in zip(held, head.weights(torch.tensor(held)).tolist(), strict=True):
                    mass[at] += weight
    return steps


def prompt_mass(row: Row, spec: SoftmaxSpec, kv_head: int) -> Tensor:
    """[prompt]: attention that each token of the prompt receives, of all its queries, added over the group."""
    row = row.double()
    mass = torch.zeros(row.prompt, dtype=torch.float64)
    for tokens in range(1, row.prompt + 1):
        for head in heads_at(row, spec, kv_head, tokens):
            mass[:tokens] += head.weights(torch.arange(tokens))
    return mass


def streaming(row: Row, spec: SoftmaxSpec, **settings: object) -> list[Step]:
    """The first tokens stay, as far as the budget has room for them beside the new token; of the rest the oldest go."""

    def protect(at: int, tokens: int, k: int, settings: dict) -> bool:
        return at < min(settings.get("sinks", 4), k - 1)

    return evicting(protect, lambda at, mass: float(at), row, spec, settings)


def h2o(row: Row, spec: SoftmaxSpec, **settings: object) -> list[Step]:
    """The k // 2 most recent tokens stay; of the rest go those that received least attention."""

    def protect(at: int, tokens: int, k: int, settings: dict) -> bool:
        return at >= tokens - k // 2

    return evicting(protect, lambda at, mass: mass[at], row, spec, settings)


def snapkv(row: Row, spec: SoftmaxSpec, **settings: Any) -> list[Step]:
    """Of the prompt the last `window` tokens, and those that its last queries attend to most, pooled over neighbours;
    and every token that is decoded."""
    row, window = row.double(), settings.get("window", 32)
    reach, average = settings.get("kernel", 5) // 2, settings.get("pooling", "avg") == "avg"
    k = budget(settings, row.prompt)
    first = max(0, row.prompt - window)
    steps = empty_steps(row)
    for kv_head in range(row.key.shape[0]):
        received = [0.0] * row.prompt
        for tokens in range(first + 1, row.prompt + 1):
            for head in heads_at(row, spec, kv_head, tokens):
                for at, weight in enumerate(head.weights(torch.arange(tokens)).tolist()):
                    received[at] += weight
        worth = []
        for at in range(first):
            near = [received[other] for other in range(max(0, at - reach), min(first, at + reach + 1))]
            worth.append(sum(near) / (2 * reach + 1) if average else max(near))
        recent = list(range(max(0, row.prompt - min(window, k)), row.prompt))
        best = sorted(range(first), key=lambda at: -worth[at])[: k - len(recent)]
        held = list(range(row.prompt)) if k >= row.prompt else sorted(best) + recent
        for step, tokens in zip(steps, range(row.prompt + 1, row.key.shape[1] + 1), strict=True):
            held.append(tokens - 1)
            for head in heads_at(row, spec, kv_head, tokens):
                step.output[head.index], step.read[head.index, held] = head.attend(torch.tensor(held)), True
    return steps
