"""When there are too many clusters: delta grows and clusters whose representatives are now near enough merge.

With a growth of 2 this is the doubling algorithm of incremental clustering (Charikar, Chekuri, Feder, Motwani 1997).
Where delta is not given, it begins with the smallest distance between two of the first clusters, one more than the cap.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def merge(tensors: dict[str, Tensor], over: Tensor, cap: int, growth: float, draws: Callable[[int], Tensor]) -> None:
    """Bring the sequences and heads `over` [B, H] of a sketch's tensors down to at most `cap` clusters.

    Args:
        growth: factor on delta, applied until clusters are few enough.
        draws: round -> [B, H, at least the number of clusters, t] uniform random numbers.
    """
    rounds = 0
    while bool(over.any()):
        near = _pairwise(tensors["representative"], tensors["active"])
        smallest = torch.where(near > 0, near, torch.inf).amin((2, 3))
        delta = tensors["delta"]
        tensors["delta"] = torch.where(over, torch.where(delta > 0, growth * delta, smallest), delta)
        _join(tensors, near, over, draws(rounds))
        over = tensors["active"] > cap
        rounds += 1


def _join(tensors: dict[str, Tensor], near: Tensor, over: Tensor, draws: Tensor) -> None:
    """In the order in which they were opened, each cluster joins the nearest earlier one that stays, if within delta.

    Each sample of the joint cluster is taken from either side in proportion to its members, so it is again a uniform
    sample of all members.
    """
    count, sample, delta = tensors["count"], tensors["sample"], tensors["delta"]
    clusters = count.shape[2]
    stays = torch.arange(clusters, device=count.device) < tensors["active"].unsqueeze(-1)
    for number in range(1, int(tensors["active"].max())):
        distance = near[:, :, number, :number].masked_fill(~stays[:, :, :number], torch.inf)
        into = distance.argmin(-1)
        joins = over & stays[:, :, number] & (distance.gather(-1, into.unsqueeze(-1)).squeeze(-1) <= delta)
        sequence, head = joins.nonzero(as_tuple=True)
        if not len(sequence):
            continue
        target = into[sequence, head]
        added, present = count[sequence, head, number], count[sequence, head, target]
        taken = draws[sequence, head, number] * (added + present).unsqueeze(-1) < added.unsqueeze(-1)
        sample[sequence, head, target] = torch.where(
            taken.unsqueeze(-1), sample[sequence, head, number], sample[sequence, head, target]
        )
        count[sequence, head, target] = present + added
        count[sequence, head, number] = 0
        stays[sequence, head, number] = False
    order = (~stays).int().argsort(dim=-1, stable=True)
    tensors["active"] = stays.sum(-1)
    tensors["count"] = count.gather(2, order)
    for name in ("representative", "sample"):
        index = order.view(*order.shape, *[1] * (tensors[name].dim() - 3)).expand_as(tensors[name])
        tensors[name] = tensors[name].gather(2, index)


def _pairwise(representative: Tensor, active: Tensor) -> Tensor:
    """[B, H, C, C] float64 distances between representatives, infinity where there is no cluster."""
    dtype = torch.promote_types(representative.dtype, torch.float32)
    near = torch.cdist(
        representative.to(dtype), representative.to(dtype), compute_mode="donot_use_mm_for_euclid_dist"
    ).double()
    vacant = torch.arange(near.shape[-1], device=near.device) >= active.unsqueeze(-1)
    return near.masked_fill(vacant.unsqueeze(-1) | vacant.unsqueeze(-2), torch.inf)
