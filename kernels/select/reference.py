"""The definition, in plain torch: the largest of keys that no two scores of a row share."""

import torch
from torch import Tensor

NOTHING = -0x7F800001
"""The order of -inf, NaN and what stands beyond the length."""


def select(
    scores: Tensor, k: int | Tensor, lengths: Tensor, index: Tensor, count: Tensor, arrivals: Tensor | None
) -> None:
    """Writes `index` and `count`, already checked; see `kvcal.kernels.select.select`."""
    tokens, most = scores.shape[-1], min(scores.shape[-1], index.shape[-1])
    most = most if isinstance(k, Tensor) else min(most, k)
    best, token = unique_keys(scores, lengths).topk(most, sorted=isinstance(k, Tensor))
    chosen = best > NOTHING << 32
    if isinstance(k, Tensor):
        chosen &= torch.arange(most, device=scores.device) < k[:, None, None]
    count.copy_(chosen.sum(-1))
    ascending = token.where(chosen, tokens).sort(-1).values
    index.zero_()
    index[..., :most] = ascending.where(ascending < tokens, 0)


def unique_keys(scores: Tensor, lengths: Tensor) -> Tensor:
    """[B, Hkv, S] int64: the score's order times 2³², minus the token, so that the first of equals is the largest."""
    token = torch.arange(scores.shape[-1], device=scores.device)
    held = scores.float().nan_to_num(-torch.inf, torch.inf, -torch.inf)
    held = held.where(token < lengths[:, None, None], -torch.inf)
    bits = held.add_(0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0
    # As integers, floats from zero up are in order, and those below once all bits but the sign are inverted.
    order = bits ^ (bits >> 31).bitwise_and_(0x7FFFFFFF)
    return order.long().bitwise_left_shift_(32).sub_(token)
