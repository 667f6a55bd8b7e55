"""The two halves of a pass of cosine k-means: every token to its nearest centroid, and every cluster's sum."""

import torch
from torch import Tensor

from ..backend import check_operand, choose
from . import reference

__all__ = ["assign", "update"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
WIDEST = 512
"""Dimensions of a key at most: a tile of keys stays in shared memory."""


def assign(
    unit: Tensor,
    centroids: Tensor,
    lengths: Tensor,
    counts: Tensor,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The centroid of largest dot product with each key; of equal ones, the lowest index.

    Args:
        unit: [B, H, S, D] float16, bfloat16 or float32, finite, of unit length (or zero): float32 goes through two
            float16 numbers, which hold up to 255. Contiguous along D, other strides as they come; D up to 512.
        centroids: [B, H, C, D], as `unit` and in its dtype.
        lengths: [B] int32 on the same device: tokens of each sequence.
        counts: [B] int32 on the same device: centroids of each sequence, from 1 where it has tokens.

    Returns:
        label [B, H, S] int32 and similarity [B, H, S] float32; -1 and 0 at tokens beyond the sequence's length.
    """
    batch, heads, tokens, dims = check_tokens("unit", unit)
    if dims > WIDEST:
        raise ValueError(f"unit: received {dims} dimensions, expected at most {WIDEST}")
    if centroids.dim() != 4 or (*centroids.shape[:2], centroids.shape[3]) != (batch, heads, dims):
        raise ValueError(f"centroids: received {list(centroids.shape)}, expected [{batch}, {heads}, C, {dims}]")
    if centroids.dtype != unit.dtype or centroids.device != unit.device:
        raise ValueError(
            f"centroids: received {centroids.dtype} on {centroids.device}, expected {unit.dtype} on {unit.device}"
        )
    check_operand("lengths", lengths, torch.int32, (batch,), unit)
    check_operand("counts", counts, torch.int32, (batch,), unit)
    label = torch.empty(batch, heads, tokens, dtype=torch.int32, device=unit.device)
    similarity = torch.empty(batch, heads, tokens, dtype=torch.float32, device=unit.device)
    run = reference.assign
    if choose(backend, unit) == "triton":
        from .triton_kernel import assign as run
    run(unit, centroids, lengths, counts, label, similarity)
    return label, similarity


def update(
    values: Tensor,
    labels: Tensor,
    lengths: Tensor,
    count: int,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The sum and the number of each cluster's tokens: the same numbers every time, in any batch.

    Args:
        values: [B, H, S, D] float16, bfloat16 or float32, contiguous along D, other strides as they come.
        labels: [B, H, S] int32, contiguous; tokens whose label is not in [0, count) count nowhere.
        lengths: [B] int32 on the same device: tokens of each sequence.
        count: C, from 1.

    Returns:
        sums [B, H, C, D] float32 and sizes [B, H, C] int32, zeros for empty clusters.
    """
    batch, heads, tokens, dims = check_tokens("values", values)
    if count < 1:
        raise ValueError(f"count: received {count}, expected at least 1")
    check_operand("labels", labels, torch.int32, (batch, heads, tokens), values)
    check_operand("lengths", lengths, torch.int32, (batch,), values)
    sums = torch.empty(batch, heads, count, dims, dtype=torch.float32, device=values.device)
    sizes = torch.empty(batch, heads, count, dtype=torch.int32, device=values.device)
    run = reference.update
    if choose(backend, values) == "triton":
        from .triton_kernel import update as run
    run(values, labels, lengths, sums, sizes)
    return sums, sizes


def check_tokens(name: str, tokens: Tensor) -> torch.Size:
    if tokens.dim() != 4 or tokens.dtype not in FLOATS:
        raise ValueError(
            f"{name}: received {tokens.dtype} {list(tokens.shape)}, expected float16, bfloat16 or float32 [B, H, S, D]"
        )
    if tokens.shape[-1] > 1 and tokens.stride(-1) != 1:
        raise ValueError(f"{name}: received stride {tokens.stride(-1)} along D, expected 1")
    return tokens.shape
