"""The definition in plain torch."""

import torch
from torch import Tensor

from ..attend.reference import softmax
from ..pages import ordered
from ..pages.table import within


def dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    *,
    scaling: float,
    softcap: float | None,
    sink_logits: Tensor | None,
    table: Tensor | None,
) -> Tensor:
    table = within(table, lengths)
    key, value = ordered(key, table), ordered(value, table)
    held = torch.arange(key.shape[2], device=key.device) < lengths.view(-1, 1, 1, 1)
    return softmax(query, key.unsqueeze(2), value.unsqueeze(2), held, scaling, softcap, sink_logits)
