"""What the launchers share: tile sizes, and the constants of the logits."""

import triton
from torch import Tensor

from ..backend import interpreting
from .shapes import TOKEN_TILE

WARPS, STAGES = 4, 3
TILE_BYTES = 16384
"""Bytes of keys in one tile, and of values: three stages of both leave room for two programs on a multiprocessor."""


def tiles(query: Tensor, value: Tensor, queries: int) -> dict[str, int]:
    """The compile-time sizes of a kernel whose groups have this many queries."""
    width, value_width = (max(16, triton.next_power_of_2(tensor.shape[-1])) for tensor in (query, value))
    fitting = TILE_BYTES // (max(width, value_width) * query.element_size())
    return {
        "QUERIES": queries,
        "QUERY_TILE": max(16, triton.next_power_of_2(queries)),
        "TOKEN_TILE": min(TOKEN_TILE, max(16, fitting)),
        "D": query.shape[-1],
        "D_TILE": width,
        "DV": value.shape[-1],
        "DV_TILE": value_width,
        "UPCAST": interpreting(),
    }


def units_tile(units: int) -> int:
    return max(16, triton.next_power_of_2(units))


def logit_scales(scaling: float, softcap: float | None) -> tuple[float, float]:
    """(scale, cap) as `tile.absorb` has them."""
    log2e = 1.4426950408889634
    return (log2e * scaling, 0.0) if softcap is None else (2 * log2e * scaling / softcap, log2e * softcap)
