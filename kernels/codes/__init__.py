"""Low-bit codes of vectors whose dimensions are alike: a level for each dimension, one scale for all."""

import math

import torch
from torch import Tensor

__all__ = ["BITS", "decode", "encode", "fields_of", "products", "rotation"]

BITS = (2, 4, 8)
STEP = {2: 0.9957, 4: 0.3352}
"""Distance of neighbouring levels that loses least of a normal distribution of deviation 1 (Max 1960)."""
OFFSET = {2: 1.5, 4: 7.5, 8: 127.5}
"""Stored whole number minus level."""
LARGEST_SCALE = 65504.0
"""float16's largest number."""


def encode(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(codes, scales) with values ≈ scales · levels.

    Levels lie one apart and symmetric around zero, ±1/2, ±3/2, …. A vector x takes those nearest to x / step, where the
    step is that at which the outermost level reaches the largest magnitude, and with few bits no more than `STEP` times
    the root mean square: what is larger is clipped. The scale is then x·x / x·levels, with which x·(scale · levels) is
    x·x: estimates of products are not shrunk (as in RaBitQ, Gao and Long 2024).

    Args:
        values: [..., n], n a multiple of `fields_of(bits)`.

    Returns:
        uint8 [..., n / fields_of(bits)], and float16 [...], 0 for vectors of zeros.
    """
    if bits not in BITS:
        raise ValueError(f"bits: received {bits!r}, expected one of {', '.join(map(str, BITS))}")
    fields = fields_of(bits)
    if values.shape[-1] % fields:
        raise ValueError(f"values: received {values.shape[-1]} dimensions, expected a multiple of {fields}")
    values, half = values.float(), 1 << bits - 1
    square = values.square().sum(-1)
    step = values.abs().amax(-1) / (half - 0.5)
    if bits in STEP:
        step = torch.minimum(step, (square / values.shape[-1]).sqrt() * STEP[bits])
    integers = torch.floor(values / step.where(step > 0, torch.inf).unsqueeze(-1)).clamp(-half, half - 1)
    along = (values * (integers + 0.5)).sum(-1)
    scales = (square / along.where(square > 0, 1.0)).clamp(max=LARGEST_SCALE).half()
    codes = torch.zeros_like(integers[..., : values.shape[-1] // fields], dtype=torch.uint8)
    for field, part in enumerate((integers + half).to(torch.uint8).chunk(fields, -1)):
        codes |= part << field * bits
    return codes, scales


def decode(codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    """[..., n] float32."""
    return (_stored(codes, bits) - OFFSET[bits]) * scales.float().unsqueeze(-1)


def products(query: Tensor, codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    """[..., m, S] float32: query [..., m, n] times what codes [..., S, n / fields] and scales [..., S] stand for.

    The levels' offset and the scales are applied to the products, which are fewer than the levels.
    """
    dots = query @ _stored(codes, bits).mT
    return (dots - OFFSET[bits] * query.sum(-1, keepdim=True)) * scales.float().unsqueeze(-2)


def _stored(codes: Tensor, bits: int) -> Tensor:
    """[..., n] float32: the whole numbers from 0 that levels are stored as. A byte holds dimensions that lie n / fields
    apart, lowest bits first."""
    if bits == 8:
        return codes.float()
    if bits == 4:
        return torch.cat((codes & 15, codes >> 4), -1).float()
    return torch.cat((codes & 3, codes >> 2 & 3, codes >> 4 & 3, codes >> 6), -1).float()


def fields_of(bits: int) -> int:
    """Dimensions in a byte."""
    return 8 // bits


def rotation(dims: int) -> Tensor:
    """[n, n] float64, orthonormal: signs of a fixed sequence, then the discrete cosine transform.

    It spreads every dimension over all, so that those of a rotated vector are alike and few levels serve them alike
    (as the randomised Hadamard transform does, for any number of dimensions).
    """
    dim = torch.arange(dims, dtype=torch.float64)
    cosines = torch.cos(math.pi / dims * dim.unsqueeze(1) * (dim + 0.5)) * math.sqrt(2 / dims)
    cosines[0] *= math.sqrt(0.5)
    return cosines * _signs(dims)


def _signs(count: int) -> Tensor:
    """[n] of 1 and -1: the high bits of multiples of the golden ratio's fraction, squared (Weyl's sequence)."""
    steps = torch.arange(1, count + 1, dtype=torch.float64)
    return torch.where((steps.square() * 0.6180339887498949) % 1 < 0.5, 1.0, -1.0).double()
