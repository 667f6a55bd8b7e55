"""What a scan takes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..backend import NUMBA_FLOATS

OUTWEIGHS = 2.0**60
"""A token with so many times the weight of the whole sample is read whatever the threshold: no sum overflows then."""
PAGE = 64
"""Tokens that a correction is of."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """What is kept of tokens, [B, Hkv, capacity, …] each. One object serves as long as the buffers stand still."""

    key: Tensor
    """[…, D], float16, bfloat16 or float32; or uint8: 8-bit codes of what the codeword leaves, rotated."""
    value: Tensor
    """[…, Dv], likewise."""
    reduced: Tensor
    """What tokens are scored by: […, n] uint8, low-bit codes (`kernels.codes`) of what a key's codeword leaves; or
    […, r or more], reduced keys in the dtype of `key`."""
    scale: Tensor | None = None
    """[…, 1] float16, of the codes."""
    codeword: Tensor | None = None
    """[…, 1] uint8; None: reduced keys, which stand for whole keys."""
    key_scale: Tensor | None = None
    """[…, 1] float16; only of keys in 8 bits."""
    value_scale: Tensor | None = None
    correction: Tensor | None = None
    """[B, Hkv, capacity / PAGE, Dv] uint8: of each full page the mean of what codewords leave of values."""
    correction_scale: Tensor | None = None
    """[B, Hkv, capacity / PAGE, 1] float16."""

    @cached_property
    def fits_numba(self) -> bool:
        """Whether the kernel in numba takes them: heads first in memory, known dtypes, and what tokens are scored by in
        words of 4 bytes."""
        held = [part for part in vars(self).values() if isinstance(part, Tensor)]
        return (
            self.key.dtype == self.value.dtype
            and self.key.dtype in (*NUMBA_FLOATS, torch.uint8)
            and self.reduced.shape[-1] * self.reduced.element_size() % 4 == 0
            and all(part.transpose(0, 1).is_contiguous() for part in held)
        )

    @cached_property
    def arrays(self) -> Any:
        """The same memory for the kernel in numba."""
        from .launch import tokens_of

        return tokens_of(self)


@dataclass(frozen=True, eq=False)
class Tables:
    """Calibrated tensors of a layer, float32."""

    query_map: Tensor
    """[Hkv, D, r]: a query's products with what tokens are scored by are those of q·query_map."""
    key: Tensor | None = None
    """[Hkv, C, D]: codewords."""
    value: Tensor | None = None
    """[Hkv, C, Dv]"""
    turn_key: Tensor | None = None
    """[D, D], the rotation of keys in 8 bits."""
    turn_value: Tensor | None = None
    """[Dv, Dv]"""

    @cached_property
    def arrays(self) -> Any:
        from .launch import tables_of

        return tables_of(self)


@dataclass(frozen=True, eq=False)
class Budget:
    """Which tokens of each sequence are read, [B] int64 each."""

    lengths: Tensor
    """Tokens of each sequence."""
    first: Tensor
    """The first tokens, so many, are always read; the next is the first candidate."""
    begin: Tensor
    """From here to the end tokens are always read."""
    stride: Tensor
    """The sample is the candidates among every stride-th token."""
    rank: Tensor
    """Candidates are read whose score reaches that of the rank-th best of the sample; 0: none, -1: all. Where the
    sample has fewer candidates: all."""
    longest: int
    """The longest sequence, known on the host."""

    @cached_property
    def sampled(self) -> int:
        """Tokens that are sampled of a sequence, at most; a power of two, so that few workspaces are made as sequences
        grow. Waits for the device."""
        most = int((-(-self.lengths // self.stride)).max())
        return 1 << max(0, most - 1).bit_length()

    @cached_property
    def arrays(self) -> Any:
        from .launch import budget_of

        return budget_of(self)
