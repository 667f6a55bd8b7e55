"""Scores of every held token from a low-rank index: the first pass of a step."""

import math

import torch
from torch import Tensor

from ..backend import choose
from .reference import score as reference

__all__ = ["score"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def score(
    query: Tensor,
    index: Tensor,
    lengths: Tensor,
    *,
    scaling: float,
    combine: str = "none",
    softcap: float | None = None,
    out_dtype: torch.dtype = torch.float32,
    block: int = 128,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Logits of every query against every token's entry of the index: scaling · (query · entry), then `softcap`.

    Args:
        query: [B, Hkv, G, r], float16, bfloat16 or float32, any scaling of single dimensions folded in.
        index: [B, Hkv, S, r] in query's dtype, contiguous per token, other strides as they come (the first r of D
            dimensions, say).
        lengths: [B] int32 on the same device: tokens of each row.
        scaling: positive.
        combine: "none": every query's logits; "max": the largest of the group's.
        out_dtype: float32 or float16 (half the bytes for `select` to read; larger magnitudes become the largest).
        block: tokens of one tile of the kernel, a power of two from 64. 128 are few enough bytes for two or three tiles
            on their way at once.
        out: written and returned instead of a new tensor; contiguous.

    Returns:
        [B, Hkv, G, S] or, with combine="max", [B, Hkv, S]; -inf at tokens beyond the row's length.
    """
    batch, heads, group, _ = check(query, index, lengths)
    tokens = index.shape[2]
    if combine not in ("none", "max"):
        raise ValueError(f"combine: received {combine!r}, expected 'none' or 'max'")
    if not (scaling > 0 and math.isfinite(scaling)):
        raise ValueError(f"scaling: received {scaling!r}, expected a positive number")
    if block < 64 or block & (block - 1):
        raise ValueError(f"block: received {block!r}, expected a power of two from 64")
    shape = (batch, heads, group, tokens) if combine == "none" else (batch, heads, tokens)
    if out is None:
        out = torch.empty(shape, dtype=out_dtype, device=query.device)
    check_output("out", out, shape, (torch.float32, torch.float16), query)
    run = reference
    if choose(backend, query) == "triton":
        from .triton_kernel import score as run
    run(query, index, lengths, out, scaling=scaling, combine=combine, softcap=softcap, block=block)
    return out


def check(query: Tensor, index: Tensor, lengths: Tensor) -> torch.Size:
    if query.dtype not in FLOATS:
        raise ValueError(f"query: received {query.dtype}, expected float16, bfloat16 or float32")
    if index.dtype != query.dtype:
        raise ValueError(f"index: received {index.dtype}, expected {query.dtype}")
    batch, heads, _, rank = query.shape
    if index.dim() != 4 or index.shape[:2] != (batch, heads) or index.shape[3] != rank:
        raise ValueError(f"index: received {list(index.shape)}, expected [{batch}, {heads}, S, {rank}]")
    if query.stride(-1) != 1 or index.stride(-1) != 1:
        raise ValueError("query, index: expected the last dimension to be contiguous")
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
