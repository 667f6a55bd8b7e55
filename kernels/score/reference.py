"""The definition of `score` in plain torch."""

import torch
from torch import Tensor

from ..pages import ordered
from ..pages.table import within


def score(
    query: Tensor,
    key: Tensor,
    lengths: Tensor,
    out: Tensor,
    *,
    scaling: float,
    softcap: float | None,
    block: int,
    table: Tensor | None,
) -> None:
    """Writes `out`, already checked; see `kvcal.kernels.score.score`."""
    key = ordered(key, within(table, lengths))
    logits = (query.float() @ key.float().mT).mul_(scaling)
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    present = torch.arange(out.shape[-1], device=out.device) < lengths.view(-1, 1, 1, 1)
    out.copy_(logits.where(present, -torch.inf))
