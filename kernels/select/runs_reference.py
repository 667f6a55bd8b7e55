"""The definition of `select_runs` in plain torch: a stable sort and a cumulative sum, which the kernel does without."""

import torch
from torch import Tensor


def select_runs(
    scores: Tensor,
    starts: Tensor,
    sizes: Tensor,
    room: Tensor,
    counts: Tensor,
    leading: tuple[Tensor, Tensor] | None,
    out: tuple[Tensor, Tensor, Tensor],
    unread: Tensor | None,
) -> None:
    """Writes `out` and `unread`, already checked; see `kvcal.kernels.select.select_runs`."""
    batch, heads, clusters = scores.shape
    starts, sizes = (of.repeat_interleave(heads // of.shape[1], 1) for of in (starts, sizes))
    cluster = torch.arange(clusters, device=scores.device)
    size = sizes.clamp_min(0).long() * (cluster < counts[:, None, None])
    eligible = (size > 0) & (scores > -torch.inf)
    first = 0 if leading is None else leading[0].shape[-1]
    slots = out[0].shape[-1] - first

    order = scores.float().where(eligible, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    ordered = size.where(eligible, 0).gather(-1, order)
    left = room.view(batch, -1, 1).long() - (ordered.cumsum(-1) - ordered)
    best_first = ordered.minimum(left.clamp_min(0)) * (cluster < slots)
    taken = torch.zeros_like(size).scatter_(-1, order, best_first)

    number = (taken > 0).sum(-1)
    ascending = cluster.where(taken > 0, clusters).sort(-1).values[..., :slots]
    for result, of, lead in zip(out, (starts, taken), leading or (None, None), strict=False):
        result.zero_()
        if lead is not None:
            result[..., :first] = lead.unsqueeze(1)
        chosen = of.gather(-1, ascending.clamp_max(clusters - 1)).where(ascending < clusters, 0)
        result[..., first : first + chosen.shape[-1]] = chosen.to(result.dtype)
    out[2].copy_(number + first)
    if unread is not None:
        unread.copy_(size - taken)
