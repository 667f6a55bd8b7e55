"""Codes of the index: symmetric integers with one float16 scale per token, or plain floats.

Four bits: byte j of a token holds dimension j in its low nibble and dimension r/2 + j in its high one, each as
code + 8. A kernel then takes the two halves of the query to the two nibbles and never interleaves anything.
"""

import torch
from torch import Tensor

LARGEST = {8: 127, 4: 7}
"""The largest code by bits; codes are symmetric around zero."""
LARGEST_SCALE = 65504.0
"""float16's largest number."""


def quantize(values: Tensor, bits: int) -> tuple[Tensor, Tensor | None]:
    """(codes, scales) with values ≈ scales · codes, each token by its own largest magnitude.

    Args:
        values: [..., r]; r even for 4 bits.
        bits: 16, 8 or 4.

    Returns:
        16 bits: `values` as they are (whatever their float dtype) and None. 8: int8 [..., r] and float16 [...].
        4: uint8 [..., r/2] and float16 [...].
    """
    check_bits(bits)
    if bits == 16:
        return values, None
    if bits == 4 and values.shape[-1] % 2:
        raise ValueError(f"values: received {values.shape[-1]} dimensions, expected an even number for 4 bits")
    values = values.float()
    largest = LARGEST[bits]
    scales = (values.abs().amax(-1) / largest).clamp(max=LARGEST_SCALE).half()
    divisors = torch.where(scales > 0, scales.float(), torch.inf).unsqueeze(-1)
    codes = torch.floor(values / divisors + 0.5).clamp(-largest, largest).to(torch.int8)
    if bits == 8:
        return codes, scales
    low, high = (codes + 8).view(torch.uint8).chunk(2, -1)
    return low | (high << 4), scales


def unpack(codes: Tensor, bits: int) -> Tensor:
    """[..., r] float32 codes, not yet multiplied by their scales."""
    check_bits(bits)
    if bits != 4:
        return codes.float()
    return torch.cat((codes & 15, codes >> 4), -1).float() - 8


def bits_of(codes: Tensor) -> int:
    """16, 8 or 4, by the dtype of the codes."""
    return {torch.int8: 8, torch.uint8: 4}.get(codes.dtype, 16)


def rank_of(codes: Tensor) -> int:
    """Dimensions of a token's index."""
    return codes.shape[-1] * (2 if codes.dtype == torch.uint8 else 1)


def check_bits(bits: int) -> None:
    if bits not in (16, 8, 4):
        raise ValueError(f"bits: received {bits!r}, expected 16, 8 or 4")
