"""What a two-stage choice ends with: the slots of the chosen candidates, and what the others amount to, by cluster."""

import torch
from torch import Tensor

from ..attend.shapes import Partial
from ..backend import check_operand, choose
from . import reference

__all__ = ["chosen_slots", "remainder"]


def chosen_slots(
    index: Tensor,
    count: Tensor,
    begin: Tensor,
    first: Tensor,
    recent: Tensor,
    length: Tensor,
    *,
    most_always: int,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    scores: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """What `attend` reads: the slots 0 … first - 1 and recent … length - 1 of each row, then the chosen candidates'.

    Args:
        index: [B, Hkv, K] int32 candidates, as `select` gives them, or [B, Hkv, G, K] where each query has its own.
        count: [B, Hkv] or [B, Hkv, G] int32, how many of them are meant.
        begin, starts, ends: of the candidates, as of `score_runs`; ends of each query only with an index of each.
        first, recent, length: [B] int32.
        most_always: room for first + length - recent, which must not be more.
        scores: [B, Hkv, G, M] of the candidates, contiguous: those that are read become -inf, where `remainder` has
            nothing of them.

    Returns:
        slots [B, Hkv(, G), most_always + K] int32, 0 beyond count, and count [B, Hkv(, G)] int32.
    """
    each = index.shape[2:3] if index.dim() == 4 else ()
    batch, heads = index.shape[:2]
    check_operand("index", index, torch.int32, (batch, heads, *each, index.shape[-1]), index)
    check_operand("count", count, torch.int32, (batch, heads, *each), index)
    for name, of in (("begin", begin), ("first", first), ("recent", recent), ("length", length)):
        check_operand(name, of, torch.int32, (batch,), index)
    if (starts is None) != (ends is None):
        raise ValueError("starts, ends: received one of them, expected both or none")
    if starts is not None and ends is not None:
        runs = starts.shape[-1]
        check_operand("starts", starts, torch.int32, (batch, heads, runs), index)
        check_operand("ends", ends, torch.int32, (batch, heads, *(each if ends.dim() == 4 else ()), runs), index)
    if scores is not None:
        group = each or tuple(scores.shape[2:3])
        check_operand("scores", scores, scores.dtype, (batch, heads, *group, scores.shape[-1]), index)
    if most_always < 0:
        raise ValueError(f"most_always: received {most_always}, expected at least 0")
    shape = (*count.shape, most_always + index.shape[-1])
    slots, number = torch.empty(shape, dtype=torch.int32, device=index.device), torch.empty_like(count)
    run = reference.chosen_slots
    if choose(backend, index) == "triton":
        from .slots_kernel import chosen_slots as run
    run(index, count, begin, first, recent, length, starts, ends, scores, slots, number)
    return slots, number


def remainder(
    scores: Tensor,
    ends: Tensor,
    candidates: Tensor,
    value: Tensor,
    value_scale: Tensor,
    open_sum: Tensor,
    open_count: Tensor,
    *,
    left: Tensor | None = None,
    cluster_scores: Tensor | None = None,
    bias: Tensor | None = None,
    correction: Tensor | None = None,
    scaling: float = 1.0,
    splits: int | None = None,
    backend: str = "auto",
) -> Partial:
    """The partial of what was not read: of each cluster its mean value, weighed by

        m_c = Σ e^score of its candidates + left_c e^{cluster score}

    Candidates after those of all clusters are of the open window, whose mean value is open_sum / open_count.

    Args:
        scores: [B, Hkv, G, M] float16 or float32, contiguous, -inf where a candidate was read.
        ends: [B, Hkv, C] int32, contiguous, or [B, Hkv, G, C]: candidates of each cluster and those before it.
        candidates: [B] int32: all of a row, those of the open window included.
        value: [B, Hkv, C, Dv] int8, contiguous per cluster, value_scale: [B, Hkv, C] float16.
        open_sum: [B, Hkv, Dv] float32, contiguous, open_count: [B] int32.
        left: as `ends`, float32: tokens of each cluster that are no candidates; none without it.
        cluster_scores: [B, Hkv, G, C] in scores' dtype, contiguous: with `left`.
        bias: [B, Hkv, G] float32: of each group the largest, times scaling, is added to all scores (what `score_runs`
            leaves out).
        correction: [Hkv] float32, added to all scores.
        splits: parts per group of queries; default: from the shapes.

    Returns:
        out [B, Hkv, G, n, Dv] and lse [B, Hkv, G, n] float32, as `attend` takes them for `extra`.
    """
    batch, heads, group, capacity = scores.shape
    clusters = ends.shape[-1]
    each = (group,) if ends.dim() == 4 else ()
    if scores.dtype not in (torch.float16, torch.float32):
        raise ValueError(f"scores: received {scores.dtype}, expected float16 or float32")
    if (left is None) != (cluster_scores is None):
        raise ValueError("left, cluster_scores: received one of them, expected both or none")
    if value.dim() != 4 or value.stride(-1) != 1:
        raise ValueError(f"value: received {list(value.shape)}, expected [B, Hkv, C, Dv], contiguous along Dv")
    check_operand("scores", scores, scores.dtype, (batch, heads, group, capacity), scores)
    check_operand("ends", ends, torch.int32, (batch, heads, *each, clusters), scores)
    check_operand("candidates", candidates, torch.int32, (batch,), scores)
    check_operand("value", value, torch.int8, (batch, heads, clusters, value.shape[-1]), scores, contiguous=False)
    check_operand("value_scale", value_scale, torch.float16, (batch, heads, clusters), scores, contiguous=False)
    check_operand("open_sum", open_sum, torch.float32, (batch, heads, value.shape[-1]), scores)
    check_operand("open_count", open_count, torch.int32, (batch,), scores)
    if left is not None and cluster_scores is not None:
        check_operand("left", left, torch.float32, (batch, heads, *each, clusters), scores)
        check_operand("cluster_scores", cluster_scores, scores.dtype, (batch, heads, group, clusters), scores)
    if bias is not None:
        check_operand("bias", bias, torch.float32, (batch, heads, group), scores, contiguous=False)
    if correction is not None:
        check_operand("correction", correction, torch.float32, (heads,), scores)
    operands = scores, ends, candidates, value, value_scale, open_sum, open_count, left, cluster_scores
    if choose(backend, scores) == "reference":
        return reference.remainder(*operands, bias, correction, scaling)
    from . import triton_kernel

    return triton_kernel.remainder(*operands, bias, correction, scaling, splits)
