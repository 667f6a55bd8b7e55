"""Decode attention over chosen tokens, with the model's sink logits.

How many tokens are chosen stays on the device: no call waits for it, so a call can be captured in a CUDA graph and
replayed when only values have changed.
"""

from torch import Tensor

from ..backend import choose
from . import reference
from .shapes import check_cache, check_result, check_selection

__all__ = ["attend"]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    count: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    table: Tensor | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of one token's queries to the tokens `index`, no token twice.

    Args:
        query: [B, Hkv, G, D].
        key, value: [B, Hkv, capacity, D] and [B, Hkv, capacity, Dv] in the query's dtype, stride 1 within a token.
        index: [B, Hkv, K] int32 slots, or [B, Hkv, G, K] where each query head has its own; positions in the sequence
            also where there is a table.
        count: [B, Hkv] or [B, Hkv, G] int32: only the first `count` entries of each are read.
        scaling, softcap: logit = q·k scaling, then softcap tanh(logit / softcap).
        sink_logits: [Hkv G] float32, one more logit per query head, of a token whose value is zero.
        table: [B, P] int32 or int64, the pages of each sequence (see `kernels/pages`): key and value are
            [N, Hkv, PAGE, …] with it, of any strides but the last, and the capacity is P · PAGE.
        out: contiguous, to be written and returned.

    Returns:
        [B, Hkv, G, Dv] in the query's dtype; zeros where there is nothing to attend to.

    Raises:
        ValueError: shapes or dtypes do not fit together, or the backend cannot run.
    """
    check_cache(query, key, value, table)
    check_result(query, value.shape[-1], sink_logits, out)
    check_selection(query, index, count)
    if choose(backend, query) == "reference":
        result = reference.attend(
            query, key, value, index, count, scaling=scaling, softcap=softcap, sink_logits=sink_logits, table=table
        )
        return result if out is None else out.copy_(result)
    from . import triton_kernel

    return triton_kernel.attend(
        query,
        key,
        value,
        index,
        count,
        scaling=scaling,
        softcap=softcap,
        sink_logits=sink_logits,
        table=table,
        out=out,
    )
