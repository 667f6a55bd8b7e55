"""The best of every row's scores, in ascending order of their index, without sorting the row: k of them, all that reach
a threshold, or runs of tokens until a budget of tokens is full."""

import torch
from torch import Tensor

from ..backend import check_operand, choose
from . import reference, runs_reference

__all__ = ["select", "select_runs", "select_threshold"]

Selection = tuple[Tensor, Tensor]
"""index [B, Hkv, K] int32, ascending up to count and 0 beyond, and count [B, Hkv] int32."""
Runs = tuple[Tensor, Tensor, Tensor]
"""starts and sizes [B, Hkv, F + R] int32, 0 beyond count, and count [B, Hkv] int32."""
MOST_LEADING = 16
"""Runs that may come before the chosen ones."""


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
    """The k largest scores of each row; of equal ones, the lowest index first. -inf and NaN are never chosen.

    Args:
        scores: [B, Hkv, S] float16 or float32, contiguous along S, other strides as they come. What stands beyond a
            row's length does not matter.
        k: from 1, or [B] int32 on the same device (below 0 is taken as 0); no new kernel is compiled for another k.
        lengths: [B] int32 on the same device: scores of each row, at most S.
        capacity_out: K, the slots of a row's result; k where it is not given. Of a larger k only the K best are taken.
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


def select_threshold(
    scores: Tensor,
    threshold: Tensor,
    lengths: Tensor,
    capacity_out: int,
    *,
    least: int | Tensor = 0,
    most: int | Tensor | None = None,
    out: Selection | None = None,
    arrivals: Tensor | None = None,
    backend: str = "auto",
) -> Selection:
    """All scores of each row that reach its threshold: one pass. If more than `most` do, exactly the `most` best of
    them; if fewer than `least` do, exactly the `least` best of the row.

    Args:
        threshold: [B, Hkv] float32, compared without rounding; a NaN is reached by nobody.
        capacity_out: K, the slots of a row's result.
        least, most: from 0, or [B] int32 on the same device (below 0 is taken as 0); neither compiles a new kernel, and
            K bounds both. Of `least` above `most`, `most` are taken. most=None: K.
        scores, lengths, out, arrivals: as in `select`, and so are ties, -inf and NaN.

    Returns:
        index [B, Hkv, K] int32, ascending, 0 beyond count, and count [B, Hkv] int32.
    """
    check(scores, lengths)
    check_operand("threshold", threshold, torch.float32, scores.shape[:2], scores)
    for name, bound in (("least", least), ("most", most)):
        if isinstance(bound, Tensor):
            check_operand(name, bound, torch.int32, (scores.shape[0],), scores)
        elif bound is not None and bound < 0:
            raise ValueError(f"{name}: received {bound}, expected at least 0")
    index, count = results(scores, capacity_out, out, arrivals)
    run = reference.select_threshold
    if choose(backend, scores) == "triton":
        from .triton_kernel import select_threshold as run
    run(scores, threshold, least, capacity_out if most is None else most, lengths, index, count, arrivals)
    return index, count


def select_runs(
    scores: Tensor,
    starts: Tensor,
    sizes: Tensor,
    room: Tensor,
    counts: Tensor,
    *,
    leading: tuple[Tensor, Tensor] | None = None,
    capacity_out: int | None = None,
    out: Runs | None = None,
    unread: Tensor | None = None,
    backend: str = "auto",
) -> Runs:
    """Whole runs of tokens (clusters) by falling score until `room` tokens are full, the last cut to its first tokens.

    Of equal scores, the lowest index first. -inf and NaN are never chosen, nor are runs without tokens.

    Args:
        scores: [B, Hkv, C] float16 or float32, contiguous along C; what stands beyond a row's count does not matter.
        starts, sizes: [B, Hkv / n, C] int32, contiguous along C: slots starts … starts + sizes - 1 of each run; n
            neighbouring heads of the scores share them (query heads that choose for themselves).
        room: [B] or [B, Hkv] int32: tokens that a row may take.
        counts: [B] int32: runs of each row, at most C.
        leading: starts and sizes [B, F] int32, contiguous: runs that come first in the result of every head of a row,
            outside the room (first tokens, a window); F up to 16.
        capacity_out: R, runs that a row may choose; by default C. Of more only the R best are taken.
        out: (starts, sizes, count), written and returned instead of new tensors; contiguous.
        unread: [B, Hkv, C] float32, contiguous: receives what is left of every run, 0 beyond the counts.

    Returns:
        starts and sizes [B, Hkv, F + R] int32, the chosen ascending by index, 0 beyond count; count [B, Hkv] int32.
    """
    check(scores, counts, "counts")
    batch, heads, clusters = scores.shape
    for name, of in (("starts", starts), ("sizes", sizes)):
        shape_fits = of.dim() == 3 and of.shape[0] == batch and of.shape[2] == clusters and of.shape[1] > 0
        if of.dtype != torch.int32 or not shape_fits or heads % of.shape[1] or (clusters > 1 and of.stride(-1) != 1):
            raise ValueError(
                f"{name}: received {of.dtype} {list(of.shape)}, "
                f"expected int32 [{batch}, {heads} or a divisor, {clusters}]"
            )
    check_operand("room", room, torch.int32, (batch, heads)[: max(1, room.dim())], scores)
    first = 0
    if leading is not None:
        first = leading[0].shape[-1]
        if not 0 < first <= MOST_LEADING:
            raise ValueError(f"leading: received {first} runs, expected 1 to {MOST_LEADING}")
        for name, of in zip(("leading starts", "leading sizes"), leading, strict=True):
            check_operand(name, of, torch.int32, (batch, first), scores)
    slots = clusters if capacity_out is None else capacity_out
    if slots < 1:
        raise ValueError(f"capacity_out: received {slots}, expected at least 1")
    shapes = ((batch, heads, first + slots),) * 2 + ((batch, heads),)
    if out is None:
        out = tuple(torch.empty(shape, dtype=torch.int32, device=scores.device) for shape in shapes)  # type: ignore[assignment]
    assert out is not None
    for name, of, shape in zip(("out starts", "out sizes", "out count"), out, shapes, strict=True):
        check_operand(name, of, torch.int32, shape, scores)
    if unread is not None:
        check_operand("unread", unread, torch.float32, tuple(scores.shape), scores)
    run = runs_reference.select_runs
    if choose(backend, scores) == "triton":
        from .runs_kernel import select_runs as run
    run(scores, starts, sizes, room, counts, leading, out, unread)
    return out


def check(scores: Tensor, lengths: Tensor, name: str = "lengths") -> None:
    if scores.dim() != 3 or scores.dtype not in (torch.float16, torch.float32):
        raise ValueError(
            f"scores: received {scores.dtype} {list(scores.shape)}, expected float16 or float32 [B, Hkv, S]"
        )
    if scores.shape[-1] > 1 and scores.stride(-1) != 1:
        raise ValueError(f"scores: received stride {scores.stride(-1)} along S, expected 1")
    check_operand(name, lengths, torch.int32, scores.shape[:1], scores)


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
