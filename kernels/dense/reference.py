"""The definition in plain torch: a window that begins with the first token, merged with the model's sinks."""

import torch
from torch import Tensor

from ..attend.reference import merge, window


def dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    *,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    part = window(query, key, value, torch.zeros_like(lengths), lengths, scaling=scaling, softcap=softcap)
    return merge([part], sinks, query.dtype)
