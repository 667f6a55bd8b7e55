"""Codes of the index: symmetric integers with one float16 scale per token, or plain floats.

Four and two bits: a byte holds dimensions that lie r/2 or r/4 apart, lowest bits first: byte j of a token has j and
r/2 + j, or j, r/4 + j, r/2 + j and 3r/4 + j. A kernel then takes each part of the query to one field of the bytes and
never interleaves anything. Two bits have no code for zero: their levels are -1.5, -0.5, 0.5 and 1.5.
"""

import math

import torch
from torch import Tensor

LARGEST = {8: 127, 4: 7, 2: 1.5}
"""The largest level by bits; levels are symmetric around zero and one apart."""
FIRST = {8: -127, 4: -7, 2: -2}
"""The integers that floor(value / scale + ROUNDING) is clamped to."""
LAST = {8: 127, 4: 7, 2: 1}
ROUNDING = {8: 0.5, 4: 0.5, 2: 0.0}
ZERO = {8: 0, 4: 8, 2: 2}
"""What is added to that integer where it is stored."""
LARGEST_SCALE = 65504.0
"""float16's largest number."""


def quantize(values: Tensor, bits: int, clip: float = 1.0) -> tuple[Tensor, Tensor | None]:
    """(codes, scales) with values ≈ scales · levels, each token by its own largest magnitude.

    Args:
        values: [..., r]; r even for 4 bits, a multiple of 4 for 2.
        bits: 16, 8, 4 or 2.
        clip: the largest level stands for clip · largest magnitude; what is larger is clamped. Few bits gain by it.

    Returns:
        16 bits: `values` as they are (whatever their float dtype) and None. 8: int8 [..., r] and float16 [...].
        4 and 2: uint8 [..., r/2] or [..., r/4] and float16 [...].
    """
    check_bits(bits)
    check_clip(clip)
    if bits == 16:
        return values, None
    fields = fields_of(bits)
    if values.shape[-1] % fields:
        expected = "an even number" if fields == 2 else "a multiple of 4"
        raise ValueError(f"values: received {values.shape[-1]} dimensions, expected {expected} for {bits} bits")
    values = values.float()
    scales = (values.abs().amax(-1) * clip / LARGEST[bits]).clamp(max=LARGEST_SCALE).half()
    divisors = torch.where(scales > 0, scales.float(), torch.inf).unsqueeze(-1)
    integers = torch.floor(values / divisors + ROUNDING[bits]).clamp(FIRST[bits], LAST[bits]).to(torch.int8)
    if bits == 8:
        return integers, scales
    codes = torch.zeros_like(integers[..., : values.shape[-1] // fields], dtype=torch.uint8)
    for field, part in enumerate((integers + ZERO[bits]).view(torch.uint8).chunk(fields, -1)):
        codes |= part << field * bits
    return codes, scales


def unpack(codes: Tensor, bits: int) -> Tensor:
    """[..., r] float32 levels, not yet multiplied by their scales."""
    check_bits(bits)
    if bits > 4:
        return codes.float()
    parts = [codes >> field * bits & (1 << bits) - 1 for field in range(fields_of(bits))]
    return torch.cat(parts, -1).float() - (ZERO[bits] + ROUNDING[bits] - 0.5)


def fields_of(bits: int) -> int:
    """Dimensions in one entry of the codes."""
    return 8 // bits if bits <= 4 else 1


def rank_of(codes: Tensor, bits: int) -> int:
    """Dimensions of a token's index."""
    return codes.shape[-1] * fields_of(bits)


def check_bits(bits: int) -> None:
    if bits not in (16, 8, 4, 2):
        raise ValueError(f"bits: received {bits!r}, expected 16, 8, 4 or 2")


def check_clip(clip: float) -> None:
    if not (clip > 0 and math.isfinite(clip)):
        raise ValueError(f"clip: received {clip!r}, expected a positive number")
