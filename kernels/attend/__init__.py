"""Decode attention over chosen tokens: single rows or runs of them, merged with a window, a tail and the model's sinks.

Everything that says how much there is (counts, sizes, lengths) stays on the device: no call here waits for it, so every
call can be captured in a CUDA graph and replayed when only values have changed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backend import choose
from . import reference
from .shapes import Partial, check, check_cache, check_merge, check_selection

__all__ = ["Partial", "attend", "attend_runs", "merge", "tail", "unread", "window"]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    count: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    extra: Sequence[Partial] = (),
    splits: int | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of one token's queries to the tokens `index`, no token twice.

    Args:
        query: [B, Hkv, G, D].
        key, value: [B, Hkv, capacity, D] and [B, Hkv, capacity, Dv] in the query's dtype, stride 1 within a token.
        index: [B, Hkv, K] int32 slots, or [B, Hkv, G, K] where each query head has its own.
        count: [B, Hkv] or [B, Hkv, G] int32: only the first `count` entries of each are read.
        scaling, softcap: logit = q·k scaling, then softcap tanh(logit / softcap).
        sinks: [Hkv G] float32, one more logit per query head, of a token whose value is zero.
        extra: further partials of the same queries, over other tokens.
        splits: parts per group of queries; default: from the shapes.
        out: contiguous, to be written and returned.

    Returns:
        [B, Hkv, G, Dv] in the query's dtype; zeros where there is nothing to attend to.

    Raises:
        ValueError: shapes or dtypes do not fit together, or the backend cannot run.
    """
    check_cache(query, key, value)
    check_merge(query, value.shape[-1], sinks, extra, out)
    check_selection(query, index, "index")
    check("count", count, torch.int32, index.shape[:-1])
    if choose(backend, query) == "reference":
        result = reference.attend(
            query, key, value, index, count, scaling=scaling, softcap=softcap, sinks=sinks, extra=extra
        )
        return result if out is None else out.copy_(result)
    from . import triton_kernel

    return triton_kernel.attend(
        query, key, value, index, count,
        scaling=scaling, softcap=softcap, sinks=sinks, extra=extra, splits=splits, out=out,
    )  # fmt: skip


def attend_runs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    sizes: Tensor,
    count: Tensor | None = None,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    extra: Sequence[Partial] = (),
    most: int | None = None,
    splits: int | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention to contiguous runs of tokens: clusters, pages, the model's first tokens, a window.

    Args:
        starts, sizes: [B, Hkv, R] or [B, Hkv, G, R] int32: slots starts … starts + sizes - 1, runs that do not
            overlap; a size of 0 is no run, and its start is not looked at.
        count: [B, Hkv] or [B, Hkv, G] int32: only the first `count` runs of each are looked at; default: all.
        most: tokens that the runs of one group are expected to have at most, for the choice of splits only;
            default: the capacity.

    Everything else as in `attend`.
    """
    check_cache(query, key, value)
    check_merge(query, value.shape[-1], sinks, extra, out)
    check_selection(query, starts, "starts")
    check("sizes", sizes, torch.int32, starts.shape)
    if count is not None:
        check("count", count, torch.int32, starts.shape[:-1])
    if choose(backend, query) == "reference":
        result = reference.attend_runs(
            query, key, value, starts, sizes, count, scaling=scaling, softcap=softcap, sinks=sinks, extra=extra
        )
        return result if out is None else out.copy_(result)
    from . import runs

    return runs.attend_runs(
        query, key, value, starts, sizes, count,
        scaling=scaling, softcap=softcap, sinks=sinks, extra=extra, most=most or key.shape[2], splits=splits, out=out,
    )  # fmt: skip


def window(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    begin: Tensor,
    end: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    most: int | None = None,
    splits: int | None = None,
    backend: str = "auto",
) -> Partial:
    """The partial of the slots begin … end - 1 of each row.

    Args:
        begin, end: [B] int32.
        most: tokens that a window is expected to have at most, for the choice of splits only; default: the capacity.

    Everything else as in `attend`.
    """
    check_cache(query, key, value)
    for name, limit in (("begin", begin), ("end", end)):
        check(name, limit, torch.int32, [query.shape[0]])
    if choose(backend, query) == "reference":
        return reference.window(query, key, value, begin, end, scaling=scaling, softcap=softcap)
    from . import partials

    return partials.window(
        query, key, value, begin, end,
        scaling=scaling, softcap=softcap, most=most or key.shape[2], splits=splits,
    )  # fmt: skip


def tail(
    query: Tensor,
    mean_key: Tensor,
    mean_value: Tensor,
    unread: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    splits: int | None = None,
    backend: str = "auto",
) -> Partial:
    """The partial of clusters, each of which stands for its unread tokens at its mean key, with its mean value.

    Args:
        mean_key, mean_value: [B, Hkv, C, D] and [B, Hkv, C, Dv].
        unread: [B, Hkv, C], or [B, Hkv, G, C] where query heads read different tokens; float32. Where it is not
            above 0 the cluster is not read.

    Everything else as in `attend`.
    """
    check_cache(query, mean_key, mean_value)
    each = query.shape[2:3] if unread.dim() == 4 else []
    check("unread", unread, torch.float32, [*query.shape[:2], *each, mean_key.shape[2]])
    if choose(backend, query) == "reference":
        return reference.tail(query, mean_key, mean_value, unread, scaling=scaling, softcap=softcap)
    from . import partials

    return partials.tail(query, mean_key, mean_value, unread, scaling=scaling, softcap=softcap, splits=splits)


def unread(
    index: Tensor,
    count: Tensor,
    owner: Tensor,
    sizes: Tensor,
    begin: Tensor,
    end: Tensor,
    *,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """What `tail` takes beside `attend`: tokens of each cluster that are not among the chosen.

    Args:
        index, count: as of `attend`, no token twice.
        owner: [B, Hkv, capacity] int32, contiguous along the capacity: the cluster of each slot, looked at in begin …
            end - 1 only.
        sizes: [B, Hkv, C] int32, contiguous along C.
        begin, end: [B] int32: the slots that are in clusters.
        out: contiguous, to be written and returned.

    Returns:
        [B, Hkv, C], or [B, Hkv, G, C] as the index, float32.
    """
    if index.dim() not in (3, 4) or owner.dim() != 3 or owner.shape[:2] != index.shape[:2]:
        raise ValueError(
            f"owner: received shape {tuple(owner.shape)} for an index {tuple(index.shape)}, expected [B, Hkv, capacity]"
        )
    check("index", index, torch.int32, index.shape)
    check("count", count, torch.int32, index.shape[:-1])
    check("owner", owner, torch.int32, owner.shape)
    check("sizes", sizes, torch.int32, [*owner.shape[:2], sizes.shape[-1]])
    for name, of in (("owner", owner), ("sizes", sizes)):
        if of.shape[-1] > 1 and of.stride(-1) != 1:
            raise ValueError(f"{name}: received stride {of.stride(-1)} along its last dimension, expected 1")
    for name, limit in (("begin", begin), ("end", end)):
        check(name, limit, torch.int32, owner.shape[:1])
    shape = (*index.shape[:-1], sizes.shape[-1])
    if out is not None:
        check("out", out, torch.float32, shape)
        if not out.is_contiguous():
            raise ValueError(f"out: received strides {out.stride()}, expected a contiguous tensor")
    if choose(backend, index) == "reference":
        result = reference.unread(index, count, owner, sizes, begin, end)
        return result if out is None else out.copy_(result)
    from . import counting

    out = torch.empty(shape, dtype=torch.float32, device=index.device) if out is None else out
    return counting.unread(index, count, owner, sizes, begin, end, out)


def merge(
    query: Tensor,
    partials: Sequence[Partial],
    *,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The attention of `query` that partials over disjoint tokens amount to; results and sinks as in `attend`."""
    if not partials:
        raise ValueError("partials: received none, expected at least one")
    width = partials[0][0].shape[-1]
    check_merge(query, width, sinks, partials, out)
    if choose(backend, query) == "reference":
        result = reference.merge(partials, sinks, query.dtype)
        return result if out is None else out.copy_(result)
    from . import merge_kernel

    return merge_kernel.merge(None, partials, sinks, query, width, out)
