"""Scores of every held token from keys of reduced dimension: the first pass of a step."""

import math

import torch
from torch import Tensor

from ..backend import check_operand, choose
from ..pages import PAGE
from ..pages.table import capacity_of, check_table
from .reference import score as reference

__all__ = ["score"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def score(
    query: Tensor,
    key: Tensor,
    lengths: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    block: int = 128,
    table: Tensor | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Logits of every query against every token's reduced key: scaling · (query · key), then `softcap`.

    Args:
        query: [B, Hkv, G, r], float16, bfloat16 or float32, any scaling of single dimensions folded in.
        key: [B, Hkv, S, r], reduced keys in query's dtype, contiguous per token, other strides as they come (the first
            r of D dimensions, say).
        lengths: [B] int32 on the same device: tokens of each sequence.
        scaling: positive.
        block: tokens of one tile of the kernel, a power of two from 64. 128 are few enough bytes for two or three tiles
            on their way at once. With a table a tile is a page.
        table: [B, P] int32 or int64, the pages of each sequence (see `kernels/pages`): key is [N, Hkv, PAGE, r] with
            it, and S is P · PAGE.
        out: float32, written and returned instead of a new tensor; contiguous.

    Returns:
        [B, Hkv, G, S] float32; -inf at tokens beyond the sequence's length.
    """
    check(query, key, lengths, table)
    if not (scaling > 0 and math.isfinite(scaling)):
        raise ValueError(f"scaling: received {scaling!r}, expected a positive number")
    if block < 64 or block & (block - 1):
        raise ValueError(f"block: received {block!r}, expected a power of two from 64")
    shape = (*query.shape[:3], capacity_of(key, table))
    if out is None:
        out = torch.empty(shape, dtype=torch.float32, device=query.device)
    check_operand("out", out, torch.float32, shape, query)
    run = reference
    if choose(backend, query) == "triton":
        from .triton_kernel import score as run
    run(query, key, lengths, out, scaling=scaling, softcap=softcap, block=block, table=table)
    return out


def check(query: Tensor, key: Tensor, lengths: Tensor, table: Tensor | None) -> None:
    if query.dtype not in FLOATS:
        raise ValueError(f"query: received {query.dtype}, expected float16, bfloat16 or float32")
    if key.dtype != query.dtype:
        raise ValueError(f"key: received {key.dtype}, expected {query.dtype}")
    batch, heads, _, rank = query.shape
    check_table(table, batch, query.device)
    fits = key.dim() == 4 and key.shape[1::2] == (heads, rank)
    if not fits or (key.shape[0] != batch if table is None else key.shape[2] != PAGE):
        expected = f"{batch}, {heads}, S" if table is None else f"N, {heads}, {PAGE}"
        raise ValueError(f"key: received {list(key.shape)}, expected [{expected}, {rank}]")
    if query.stride(-1) != 1 or key.stride(-1) != 1:
        raise ValueError("query, key: expected the last dimension to be contiguous")
    if lengths.shape != (batch,) or lengths.dtype != torch.int32 or lengths.device != query.device:
        raise ValueError(
            f"lengths: received {lengths.dtype} {list(lengths.shape)} on {lengths.device}, "
            f"expected int32 [{batch}] on {query.device}"
        )
