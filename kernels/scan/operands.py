"""What a scan takes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..backend import FLOATS
from ..pages import in_rows, ordered, page_strides

OUTWEIGHS = 2.0**60
"""A token with so many times the weight of the whole sample is read whatever the threshold: no sum overflows then."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """What is kept of tokens, [B, Hkv, capacity, …] each; with a block table [N, Hkv, PAGE, …], see `kernels.pages`.
    One object serves as long as the buffers stand still."""

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
    """[B, Hkv, capacity / PAGE, Dv] uint8: of each full page the mean of what codewords leave of values; with a block
    table [N, Hkv, 1, Dv]."""
    correction_scale: Tensor | None = None
    """[B, Hkv, capacity / PAGE, 1] float16, or [N, Hkv, 1, 1]."""

    def of_tokens(self) -> dict[str, Tensor]:
        """What is kept of single tokens, by name."""
        apart = ("correction", "correction_scale")
        return {name: part for name, part in vars(self).items() if isinstance(part, Tensor) and name not in apart}

    def of_pages(self) -> dict[str, Tensor]:
        """What is kept of whole pages, by name."""
        held = {"correction": self.correction, "correction_scale": self.correction_scale}
        return {name: part for name, part in held.items() if part is not None}

    def ordered(self, table: Tensor | None) -> Tokens:
        """The same by sequence, a copy where there is a table."""
        if table is None:
            return self
        held = {**self.of_tokens(), **self.of_pages()}
        return Tokens(**{name: ordered(part, table) for name, part in held.items()})

    @cached_property
    def fits_numba(self) -> bool:
        """Whether the kernels in numba take them: known dtypes, what is kept in whole rows, and what tokens are scored
        by in words of 4 bytes."""
        held = [*self.of_tokens().values(), *self.of_pages().values()]
        words = self.reduced.shape[3] * self.reduced.itemsize
        return (
            self.key.dtype == self.value.dtype
            and self.key.dtype in (*FLOATS, torch.uint8)
            and words % 4 == 0
            and self.reduced.storage_offset() * self.reduced.itemsize % 4 == 0
            and all(in_rows(part) for part in held)
        )

    def fits_triton(self, paged: bool) -> bool:
        """Whether the kernels for a GPU take them: known dtypes, codes in words of 4 bytes, and one order of tokens, or
        pages whose parts lie in the same pieces."""
        return self.known_to_triton and (self.pieces is not None if paged else self.in_order)

    @cached_property
    def known_to_triton(self) -> bool:
        coded = self.codeword is not None
        return (
            self.key.dtype == self.value.dtype
            and self.key.dtype in (*FLOATS, torch.uint8)
            and (not coded or (self.reduced.shape[-1] % 4 == 0 and self.reduced.data_ptr() % 4 == 0))
        )

    @cached_property
    def in_order(self) -> bool:
        return same_order([*self.of_tokens().values()]) and same_order([*self.of_pages().values()])

    @cached_property
    def pieces(self) -> tuple[int, int] | None:
        """See `page_strides`."""
        return page_strides([*self.of_tokens().values(), *self.of_pages().values()])

    @cached_property
    def arrays(self) -> Any:
        """The same memory for the kernels in numba."""
        from .launch import tokens_of

        return tokens_of(self)


@dataclass(frozen=True)
class Place:
    """How many tokens, or pages, lie between neighbours."""

    sequence: int
    head: int
    token: int

    @classmethod
    def of(cls, part: Tensor) -> Place:
        """Of a buffer, and of all that lie like it."""
        return cls(*(stride // part.shape[3] for stride in part.stride()[:3]))


def same_order(parts: Sequence[Tensor]) -> bool:
    """Whether tokens, or pages, of these buffers lie in one order, the numbers of each next to one another."""
    strides = {tuple(stride / part.shape[3] for stride in part.stride()[:3]) for part in parts}
    return len(strides) < 2 and all(part.stride(3) == 1 or part.shape[3] == 1 for part in parts)


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
    _prepared: dict[Hashable, Tensor] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def arrays(self) -> Any:
        from .launch import tables_of

        return tables_of(self)

    def prepared(self, name: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """What `make` makes of these tensors for a kernel, made once."""
        if name not in self._prepared:
            self._prepared[name] = make()
        return self._prepared[name]


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
    """The longest sequence, or a bound of it, known on the host."""
    sampled: int
    """Tokens that are sampled of a sequence, at most, likewise."""

    @cached_property
    def arrays(self) -> Any:
        from .launch import budget_of

        return budget_of(self)
