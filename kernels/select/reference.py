"""The definition, in plain torch: a stable sort, which the kernel does without."""

import torch
from torch import Tensor


def select(
    scores: Tensor, k: int | Tensor, lengths: Tensor, index: Tensor, count: Tensor, arrivals: Tensor | None
) -> None:
    """Writes `index` and `count`, already checked; see `kvcal.kernels.select.select`."""
    eligible = held(scores, lengths)
    allowed = eligible.sum(-1).clamp(max=index.shape[-1])
    count.copy_(allowed.minimum(k.clamp(min=0)[:, None]) if isinstance(k, Tensor) else allowed.clamp(max=k))
    write(scores, eligible, index, count)


def select_threshold(
    scores: Tensor,
    threshold: Tensor,
    least: int | Tensor,
    most: int | Tensor,
    lengths: Tensor,
    index: Tensor,
    count: Tensor,
    arrivals: Tensor | None,
) -> None:
    """Writes `index` and `count`, already checked; see `kvcal.kernels.select.select_threshold`."""
    eligible = held(scores, lengths)
    reaching = (eligible & (scores.float() >= threshold[..., None])).sum(-1)
    count.copy_(reaching.maximum(per_row(least)).minimum(per_row(most)).minimum(eligible.sum(-1)))
    count.clamp_(0, index.shape[-1])
    write(scores, eligible, index, count)


def per_row(number: int | Tensor) -> Tensor:
    """That broadcasts with [B, Hkv]."""
    return number[:, None] if isinstance(number, Tensor) else torch.tensor(number)


def held(scores: Tensor, lengths: Tensor) -> Tensor:
    """[B, Hkv, S] bool: within the row's length, and neither -inf nor NaN."""
    token = torch.arange(scores.shape[-1], device=scores.device)
    return (token < lengths[:, None, None]) & (scores > -torch.inf)


def write(scores: Tensor, eligible: Tensor, index: Tensor, count: Tensor) -> None:
    """The `count` best of the eligible, ascending; what is equal stays in the order of the row (a stable sort)."""
    tokens, slots = scores.shape[-1], index.shape[-1]
    best_first = scores.float().where(eligible, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    rank = torch.arange(tokens, device=scores.device)
    chosen = best_first.where(rank < count[..., None], tokens)[..., :slots].sort(-1).values
    index.zero_()
    index[..., : min(tokens, slots)] = chosen.where(chosen < tokens, 0).to(index.dtype)
