"""Low-bit codes of vectors whose dimensions are alike: a level for each dimension, one scale for all."""

import math
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "BITS", "Calibrated", "correction_of", "decode", "encode", "encode_tokens", "fields_of", "nearest", "products",
    "rotation",
]  # fmt: skip

BITS = (2, 4, 8)
STEP = {2: 0.9957, 4: 0.3352}
"""Distance of neighbouring levels that loses least of a normal distribution of deviation 1 (Max 1960)."""
OFFSET = {2: 1.5, 4: 7.5, 8: 127.5}
"""Stored whole number minus level."""
LARGEST_SCALE = 65504.0
"""float16's largest number."""


class Calibrated(dict[str, Tensor]):
    """Tensors of a layer by name, float32: "key" [Hkv, C, D], "value" [Hkv, C, Dv], the codewords; "half" [Hkv, 1, C],
    "inverse" [Hkv, 2, 1, 1], by which they are found; "key_map" [Hkv, D, r], the basis of codes; "turn_key" [D, D],
    "turn_value" [Dv, Dv], rotations of what is kept in 8 bits; "head" [Hkv, 1], 0, 1, 2, …"""

    @cached_property
    def arrays(self) -> Any:
        """The same memory for kernels in numba."""
        from .cpu import tables_of

        return tables_of(self)


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


def nearest(tables: Calibrated, key: Tensor, value: Tensor) -> Tensor:
    """[B, Hkv, T] int64: the nearest codeword of each token, of keys [B, Hkv, T, D] and values [B, Hkv, T, Dv]."""
    by_key, by_value = key.float() * tables["inverse"][:, 0], value.float() * tables["inverse"][:, 1]
    return (tables["half"] - by_key @ tables["key"].mT - by_value @ tables["value"].mT).argmin(-1)


def encode_tokens(key: Tensor, value: Tensor, tables: Calibrated, bits: int, coded: bool) -> dict[str, Tensor]:
    """What is kept beside keys [B, Hkv, T, D] and values [B, Hkv, T, Dv]: "codeword", "code" [B, Hkv, T, …] uint8,
    "scale" [B, Hkv, T, 1] float16; where `coded`, also "key", "value", "key_scale", "value_scale", in 8 bits."""
    words = nearest(tables, key, value)
    rest = {
        "key": key.float() - tables["key"][tables["head"], words],
        "value": value.float() - tables["value"][tables["head"], words],
    }
    code, scale = encode(rest["key"] @ tables["key_map"], bits)
    kept = {"codeword": words.unsqueeze(-1).to(torch.uint8), "code": code, "scale": scale.unsqueeze(-1)}
    for name, difference in rest.items() if coded else ():
        kept[name], token_scale = encode(difference @ tables[f"turn_{name}"].mT, 8)
        kept[f"{name}_scale"] = token_scale.unsqueeze(-1)
    return kept


def correction_of(
    value: Tensor, scale: Tensor | None, codeword: Tensor | None, tables: Calibrated
) -> dict[str, Tensor]:
    """ "correction" [n, Hkv, Dv] uint8 and "correction_scale" [n, Hkv, 1] float16: the mean of v − v′ over pages.

    Args:
        value: [n, Hkv, tokens, Dv], rotated codes of v − v′ where there is a `scale` of them, [n, Hkv, tokens, 1].
        codeword: [n, Hkv, tokens, 1]; used without `scale` only.
    """
    if scale is None:
        assert codeword is not None
        mean = (value.float() - tables["value"][tables["head"], codeword.squeeze(-1).long()]).mean(2)
    else:
        mean = decode(value, scale.squeeze(-1), 8).mean(2) @ tables["turn_value"]
    code, mean_scale = encode(mean, 8)
    return {"correction": code, "correction_scale": mean_scale.unsqueeze(-1)}


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
