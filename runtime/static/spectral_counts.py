"""What `spectral` reads of each row, reckoned on the device as its store reckons it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..stores.amounts import count_of
from ..stores.spectral import Spectral
from .clock import Clock, most, share
from .clustered import Open


@dataclass(frozen=True)
class Counts:
    """[B] int32, alike in all layers whose windows close together."""

    sinks: Tensor
    window: Tensor
    """Where the open window begins."""
    recent: Tensor
    """Where the tokens begin that are read for being recent."""
    opened: Tensor
    """Tokens of the open window."""
    left: Tensor
    """Tokens that the choice is among; all of a row that is read whole."""
    room: Tensor
    """Clustered tokens whose codes are read."""
    candidates: Tensor
    """These, and those of the open window that are not recent."""
    none: Tensor
    """0"""


def counts(of: Spectral, clock: Clock, held: Open, clusters: Tensor) -> Counts:
    """Args: clusters: [B] int32 of each row."""
    seen = clock.seen
    budget = clock.budgets(of)
    of_recent = (budget // 2 - of.sinks).clamp(1, max(1, of.recent))
    recent = torch.maximum(held.window, seen - of_recent)
    whole = (budget == seen) | (clusters == 0)
    left = torch.where(whole, seen, (budget - held.sinks - (seen - recent)).clamp_min(0))
    clustered = held.window - held.sinks
    refined = torch.minimum(clustered, torch.maximum(share(of.refine, clustered), left))
    room = torch.where(seen < of.flat_below, clustered, refined)
    opened, candidates = seen - held.window, room + recent - held.window
    return Counts(held.sinks, held.window, recent, opened, left, room, candidates, torch.zeros_like(seen))


def is_flat(of: Spectral, capacity: int) -> bool:
    """Whether rows of at most `capacity` tokens have all codes read, all of them."""
    return capacity < of.flat_below or of.refine == 1.0


def most_candidates(of: Spectral, capacity: int, shortest: int) -> int:
    """Of a row that has `shortest` tokens or more, and `capacity` at most."""
    if is_flat(of, capacity):
        return capacity
    flat = min(capacity, of.flat_below - 1) if shortest < of.flat_below else 0
    return min(capacity, max(most_read(of, capacity), count_of(of.refine, capacity), flat) + of.window)


def most_read(of: Spectral, capacity: int) -> int:
    """Candidates that are read of a row of at most `capacity` tokens."""
    return min(capacity, max(most(of, capacity), of.window))  # a row without clusters is read whole
