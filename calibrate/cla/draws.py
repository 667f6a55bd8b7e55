"""Which blocks a step trains on, and what dropout it draws: functions of the seed and the step alone.

So a run that was interrupted ends where it would have ended.
"""

from __future__ import annotations

import torch
from torch import Tensor


def blocks_of(step: int, blocks: int, batch_size: int, seed: int) -> Tensor:
    """[batch_size] int64 block numbers of a step (from 0): each epoch takes all blocks in an order of its own."""
    first = step * batch_size
    epochs = range(first // blocks, (first + batch_size - 1) // blocks + 1)
    orders = [torch.randperm(blocks, generator=_generator(seed, epoch)) for epoch in epochs]
    start = first - epochs.start * blocks
    return torch.cat(orders)[start : start + batch_size]


def dropout_seed(step: int, seed: int) -> int:
    return int(torch.randint(2**62, (1,), generator=_generator(seed, step, kind=1)))


def _generator(seed: int, number: int, kind: int = 0) -> torch.Generator:
    # An odd factor keeps seeds and numbers apart; the generator mixes the bits.
    return torch.Generator().manual_seed((seed * 2_000_003 + 2 * number + kind) % 2**63)
