"""Random numbers that depend on what they are for and on nothing else: not on batch, blocks, order or device.

splitmix64 (Steele, Lea, Flood 2014) as a counter-based generator: one mixing per coordinate.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def uniform(seed: int, stream: int, position: Tensor, head: Tensor, slots: int) -> Tensor:
    """[…, slots] float64 in [0, 1 - 2^-52] for every position and head: int64 tensors that broadcast to […].

    Args:
        stream: what the numbers are for; different streams of a seed are independent.
    """
    word = _mix(torch.tensor(_signed(seed + _GOLDEN * (stream + 1)))).to(position.device)
    for coordinate in (position, head):
        word = _mix(word + (coordinate + 1) * _signed(_GOLDEN))
    word = _mix(word.unsqueeze(-1) + (torch.arange(slots, device=position.device) + 1) * _signed(_GOLDEN))
    # 52 bits, so that a number times a weight is less than the weight after rounding, too.
    return _shifted(word, 12).double() * 2.0**-52


def _mix(word: Tensor) -> Tensor:
    """The finaliser of splitmix64; int64 wraps around as its uint64 does."""
    word = (word ^ _shifted(word, 30)) * _signed(_FIRST)
    word = (word ^ _shifted(word, 27)) * _signed(_SECOND)
    return word ^ _shifted(word, 31)


def _shifted(word: Tensor, bits: int) -> Tensor:
    """Shifted to the right, filled with zeros."""
    return (word >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    word &= _WORD
    return word - (1 << 64) if word >> 63 else word
