"""Decode attention over all tokens of each sequence: other operations are compared with it, and fall back to it."""

import torch
from torch import Tensor

from ..attend.shapes import check, check_cache, check_result
from ..backend import choose
from ..pages import in_rows
from . import reference

__all__ = ["dense"]


def dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    table: Tensor | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of one token's queries to the first `lengths` tokens of each sequence.

    Args:
        query: [B, Hkv, G, D].
        key, value: [B, Hkv, capacity, D] and [B, Hkv, capacity, Dv] in the query's dtype, stride 1 within a token.
        lengths: [B] int32, on the device; never waited for.
        scaling, softcap: logit = q·k scaling, then softcap tanh(logit / softcap).
        sink_logits: [Hkv G] float32, one more logit per query head, of a token whose value is zero.
        table: [B, P] int32 or int64, the pages of each sequence (see `kernels/pages`): key and value are
            [N, Hkv, PAGE, …] with it, of any strides but the last, and the capacity is P · PAGE.
        out: contiguous, to be written and returned.

    Returns:
        [B, Hkv, G, Dv] in the query's dtype; zeros for a sequence without tokens.

    Raises:
        ValueError: shapes or dtypes do not fit together, or the backend cannot run.
    """
    check_cache(query, key, value, table)
    check_result(query, value.shape[-1], sink_logits, out)
    check("lengths", lengths, torch.int32, [query.shape[0]])
    chosen = choose(backend, query, numba=True)
    if chosen == "numba" and fits(key, value):
        from .launch import dense as on_cpu

        return on_cpu(
            query, key, value, lengths, scaling=scaling, softcap=softcap, sink_logits=sink_logits, table=table, out=out
        )
    if chosen == "numba" and backend == "numba":
        raise ValueError("key, value: backend 'numba' takes tokens that lie whole rows apart: use 'reference'")
    if chosen != "triton":
        result = reference.dense(
            query, key, value, lengths, scaling=scaling, softcap=softcap, sink_logits=sink_logits, table=table
        )
        return result if out is None else out.copy_(result)
    from . import triton_kernel

    return triton_kernel.dense(
        query, key, value, lengths, scaling=scaling, softcap=softcap, sink_logits=sink_logits, table=table, out=out
    )


def fits(key: Tensor, value: Tensor) -> bool:
    """Whether the kernel in numba takes these caches."""
    return in_rows(key) and in_rows(value)
