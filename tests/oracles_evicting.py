"""The methods that forget tokens, written down from their papers; see `oracles`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from oracle_heads import budget, heads_at
from sequences import Row, Step
from torch import Tensor

from kvcal.runtime.attention import Logits


def evicting(
    protect: Callable[[int, int, int, dict], bool],
    worth: Callable[[int, dict[int, float]], float],
    row: Row,
    logits: Logits,
    settings: dict,
) -> list[Step]:
    """The steps of a method that forgets: before each step the tokens of least worth go until k are left.

    Args:
        protect: (position, n, k, settings) -> whether it may not go.
        worth: (position, attention received so far by position).
    """
    row = row.double()
    steps = [
        Step(
            torch.empty(row.query.shape[0], row.value.shape[-1], dtype=torch.float64),
            torch.zeros(row.query.shape[0], tokens, dtype=torch.bool),
        )
        for tokens in range(row.prompt + 1, row.key.shape[1] + 1)
    ]
    for kv_head in range(row.key.shape[0]):
        held = list(range(row.prompt))
        mass = dict(enumerate(prompt_mass(row, logits, kv_head).tolist()))
        for step, tokens in zip(steps, range(row.prompt + 1, row.key.shape[1] + 1), strict=True):
            k = budget(settings, tokens)
            held.append(tokens - 1)
            mass[tokens - 1] = 0.0
            while len(held) > k:
                may_go = [at for at in held[:-1] if not protect(at, tokens, k, settings)]
                held.remove(min(may_go, key=lambda at: worth(at, mass)))
            for head in heads_at(row, logits, kv_head, tokens):
                step.output[head.index], step.read[head.index, held] = head.attend(torch.tensor(held)), True
                for at, weight in zip(held, head.weights(torch.tensor(held)).tolist(), strict=True):
                    mass[at] += weight
    return steps


def prompt_mass(row: Row, logits: Logits, kv_head: int) -> Tensor:
    """[prompt]: attention that each token of the prompt receives, of all its queries, added over the group."""
    row = row.double()
    mass = torch.zeros(row.prompt, dtype=torch.float64)
    for tokens in range(1, row.prompt + 1):
        for head in heads_at(row, logits, kv_head, tokens):
            mass[:tokens] += head.weights(torch.arange(tokens))
    return mass


def streaming(row: Row, logits: Logits, **settings: object) -> list[Step]:
    """The first tokens stay, as far as the budget has room for them beside the new token; of the rest the oldest go."""

    def protect(at: int, tokens: int, k: int, settings: dict) -> bool:
        return at < min(settings.get("sinks", 4), k - 1)

    return evicting(protect, lambda at, mass: float(at), row, logits, settings)


def h2o(row: Row, logits: Logits, **settings: object) -> list[Step]:
    """The k // 2 most recent tokens stay; of the rest go those that received least attention."""

    def protect(at: int, tokens: int, k: int, settings: dict) -> bool:
        return at >= tokens - k // 2

    return evicting(protect, lambda at, mass: mass[at], row, logits, settings)
