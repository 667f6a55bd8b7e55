"""The k best of every row's scores, in ascending order of their index, without sorting the row."""

import torch
from torch import Tensor

from ..backend import check_operand, choose
from . import reference

__all__ = ["select"]

Selection = tuple[Tensor, Tensor]
"""index [B, Hkv, K] int32, ascending up to count and 0 beyond, and count [B, Hkv] int32."""


def select(
    scores: Tensor,
    k: int | Tensor,
    lengths: Tensor,
    *,
    capacity_out: int | None = None,
    out: Selection | None = None,
    arrivals: Tensor | None = None,
    backend: str = "auto",
) -> Selection:
    """The k largest scores of each row, a row being those of one (sequence, KV head); of equal ones, the lowest index
    first. -inf and NaN are never chosen.

    Args:
        scores: [B, Hkv, S] float16 or float32, contiguous along S, other strides as they come. What stands beyond a
            sequence's length does not matter.
        k: from 1, or [B] int32 on the same device (below 0 is taken as 0); no new kernel is compiled for another k.
        lengths: [B] int32 on the same device: tokens of each sequence, at most S.
        capacity_out: K, the slots of a row's result; default k. Where k is larger, only the K best are taken.
        out: (index, count), written and returned instead of new tensors; contiguous.
        arrivals: [B · Hkv] int32, zero before the call and after it: the caller's workspace, for one call at a time.
            Without it a call on rows longer than 8192 begins with a launch that zeroes its own.

    Returns:
        index [B, Hkv, K] int32, ascending, 0 beyond count, and count [B, Hkv] int32: min(k, K, what can be chosen).
    """
    check(scores, lengths)
    if isinstance(k, Tensor):
        check_operand("k", k, torch.int32, (scores.shape[0],), scores)
        if capacity_out is None:
            raise ValueError("capacity_out: received None, expected the slots of a result when k is a tensor")
    elif k < 1:
        raise ValueError(f"k: received {k}, expected at least 1")
    index, count = results(scores, capacity_out if capacity_out is not None else int(k), out, arrivals)
    run = reference.select
    if choose(backend, scores) == "triton":
        from .triton_kernel import select as run
    run(scores, k, lengths, index, count, arrivals)
    return index, count


def check(scores: Tensor, lengths: Tensor) -> None:
    if scores.dim() != 3 or scores.dtype not in (torch.float16, torch.float32):
        raise ValueError(
            f"scores: received {scores.dtype} {list(scores.shape)}, expected float16 or float32 [B, Hkv, S]"
        )
    if scores.shape[-1] > 1 and scores.stride(-1) != 1:
        raise ValueError(f"scores: received stride {scores.stride(-1)} along S, expected 1")
    check_operand("lengths", lengths, torch.int32, scores.shape[:1], scores)


def results(scores: Tensor, capacity_out: int, out: Selection | None, arrivals: Tensor | None) -> Selection:
    if capacity_out < 1:
        raise ValueError(f"capacity_out: received {capacity_out}, expected at least 1")
    rows = scores.shape[:2]
    if arrivals is not None:
        check_operand("arrivals", arrivals, torch.int32, (rows.numel(),), scores)
    if out is None:
        index = torch.empty(*rows, capacity_out, dtype=torch.int32, device=scores.device)
        return index, torch.empty(rows, dtype=torch.int32, device=scores.device)
    check_operand("out index", out[0], torch.int32, (*rows, capacity_out), scores)
    check_operand("out count", out[1], torch.int32, rows, scores)
    return out
