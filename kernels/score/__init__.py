"""Scores of every held token from a low-rank, low-bit index: the first pass of Loki's decode step."""

import math

import torch
from torch import Tensor

from ..backend import choose
from .quantize import check_bits, quantize, rank_of, unpack
from .reference import score as reference
from .runs import score_runs

__all__ = ["block_of", "quantize", "score", "score_runs", "unpack"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
CODES = {16: FLOATS, 8: (torch.int8,), 4: (torch.uint8,), 2: (torch.uint8,)}


def score(
    query: Tensor,
    codes: Tensor,
    scales: Tensor | None,
    lengths: Tensor,
    *,
    scaling: float,
    bits: int = 16,
    combine: str = "none",
    softcap: float | None = None,
    out_dtype: torch.dtype = torch.float32,
    block: int | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Logits of every query against every token's code: scaling · scale · (query · code), then `softcap`.

    Args:
        query: [B, Hkv, G, r], float16, bfloat16 or float32, any scaling of single dimensions folded in.
        codes: 16 bits: [B, Hkv, S, r] in query's dtype; 8: int8 [B, Hkv, S, r]; 4 and 2: uint8 [B, Hkv, S, r/2] and
            [B, Hkv, S, r/4], see `quantize`. Contiguous per token, other strides as they come (the first r of D
            dimensions, say).
        scales: [B, Hkv, S] float16, not negative, contiguous along S; None for 16 bits.
        lengths: [B] int32 on the same device: tokens of each row.
        scaling: positive.
        combine: "none": every query's logits; "max": the largest of the group's.
        out_dtype: float32 or float16 (half the bytes for `select` to read; larger magnitudes become the largest).
        block: tokens of one tile of the kernel, a power of two from 64; by default `block_of(bits)`.
        out: written and returned instead of a new tensor; contiguous.

    Returns:
        [B, Hkv, G, S] or, with combine="max", [B, Hkv, S]; -inf at tokens beyond the row's length.
    """
    batch, heads, group, _ = check(query, codes, scales, lengths, bits)
    tokens = codes.shape[2]
    if combine not in ("none", "max"):
        raise ValueError(f"combine: received {combine!r}, expected 'none' or 'max'")
    if not (scaling > 0 and math.isfinite(scaling)):
        raise ValueError(f"scaling: received {scaling!r}, expected a positive number")
    block = block_of(bits) if block is None else block
    if block < 64 or block & (block - 1):
        raise ValueError(f"block: received {block!r}, expected a power of two from 64")
    shape = (batch, heads, group, tokens) if combine == "none" else (batch, heads, tokens)
    if out is None:
        out = torch.empty(shape, dtype=out_dtype, device=query.device)
    check_output("out", out, shape, (torch.float32, torch.float16), query)
    run = reference
    if choose(backend, query) == "triton":
        from .triton_kernel import score as run
    run(
        query, codes, scales, lengths, out,
        scaling=scaling, bits=bits, combine=combine, softcap=softcap, block=block,
    )  # fmt: skip
    return out


def block_of(bits: int) -> int:
    """Tokens of one block, unless a call says otherwise: few enough bytes for three tiles on their way at once."""
    return 128 if bits == 16 else 256


def check(query: Tensor, codes: Tensor, scales: Tensor | None, lengths: Tensor, bits: int) -> torch.Size:
    check_bits(bits)
    if codes.dtype not in CODES[bits] or (bits == 16 and codes.dtype != query.dtype):
        expected = query.dtype if bits == 16 else CODES[bits][0]
        raise ValueError(f"codes: received {codes.dtype}, expected {expected} for {bits} bits")
    if query.dtype not in FLOATS:
        raise ValueError(f"query: received {query.dtype}, expected float16, bfloat16 or float32")
    batch, heads, _, rank = query.shape
    if codes.dim() != 4 or codes.shape[:2] != (batch, heads) or rank_of(codes, bits) != rank:
        raise ValueError(f"codes: received {list(codes.shape)}, expected [{batch}, {heads}, S, …] of rank {rank}")
    if query.stride(-1) != 1 or codes.stride(-1) != 1 or (scales is not None and scales.stride(-1) != 1):
        raise ValueError("query, codes, scales: expected the last dimension to be contiguous")
    if (scales is None) != (bits == 16):
        raise ValueError(f"scales: received {'none' if scales is None else 'some'} with {bits} bits")
    if scales is not None and (scales.shape != codes.shape[:3] or scales.dtype != torch.float16):
        raise ValueError(
            f"scales: received {scales.dtype} {list(scales.shape)}, expected float16 {list(codes.shape[:3])}"
        )
    if lengths.shape != (batch,) or lengths.dtype != torch.int32 or lengths.device != query.device:
        raise ValueError(
            f"lengths: received {lengths.dtype} {list(lengths.shape)} on {lengths.device}, "
            f"expected int32 [{batch}] on {query.device}"
        )
    return query.shape


def check_output(name: str, out: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], like: Tensor) -> None:
    if out.shape != shape or out.dtype not in dtypes or out.device != like.device or not out.is_contiguous():
        raise ValueError(
            f"{name}: received {out.dtype} {list(out.shape)} on {out.device}, expected contiguous "
            f"{' or '.join(map(str, dtypes))} {list(shape)} on {like.device}"
        )
