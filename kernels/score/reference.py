"""The definition of `score` in plain torch."""

import torch
from torch import Tensor


def score(
    query: Tensor,
    index: Tensor,
    lengths: Tensor,
    out: Tensor,
    *,
    scaling: float,
    combine: str,
    softcap: float | None,
    block: int,
) -> None:
    """Writes `out`, already checked; see `kvcal.kernels.score.score`."""
    logits = (query.float() @ index.float().mT).mul_(scaling)
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    if combine == "max":
        logits = logits.amax(2)
    if out.dtype != torch.float32:
        largest = torch.finfo(out.dtype).max
        logits.clamp_(-largest, largest)
    present = torch.arange(out.shape[-1], device=out.device) < lengths.view(-1, *[1] * (out.dim() - 1))
    out.copy_(logits.where(present, -torch.inf))
