"""The definitions in plain torch. Signatures: `__init__.py`."""

import torch
from torch import Tensor

from ..attend.shapes import Partial
from ..score.runs_reference import candidate_slots


def chosen_slots(
    index: Tensor,
    count: Tensor,
    begin: Tensor,
    first: Tensor,
    recent: Tensor,
    length: Tensor,
    starts: Tensor | None,
    ends: Tensor | None,
    scores: Tensor | None,
    slots: Tensor,
    number: Tensor,
) -> None:
    """Writes `slots` and `number`, and into `scores`, already checked."""
    count = count.clamp(0, index.shape[-1])
    rest = [1] * (index.dim() - 1)
    first, recent, length = (of.view(-1, *rest) for of in (first, recent, length))
    always = first + length - recent
    place = torch.arange(slots.shape[-1], device=index.device).expand(slots.shape)
    taken = (place - always).clamp(0, index.shape[-1] - 1)
    far_end = torch.full_like(begin, torch.iinfo(torch.int32).max // 2)  # the index is trusted
    chosen, _ = candidate_slots(starts, ends, begin, far_end, index.gather(-1, taken))
    always_slots = torch.where(place < first, place, recent + place - first)
    number.copy_(count + always.squeeze(-1))
    slots.copy_(torch.where(place < always, always_slots, chosen).where(place < number.unsqueeze(-1), 0))
    if scores is not None:
        counted = torch.arange(index.shape[-1], device=index.device) < count.unsqueeze(-1)
        index, counted = (
            of if of.dim() == 4 else of.unsqueeze(2).expand(-1, -1, scores.shape[2], -1) for of in (index, counted)
        )
        # Entries beyond the count repeat a candidate: add, so that no order of writing matters.
        gone = torch.zeros(index.shape, dtype=scores.dtype, device=scores.device).masked_fill(counted, -torch.inf)
        scores.scatter_add_(-1, index.long(), gone)


def remainder(
    scores: Tensor,
    ends: Tensor,
    candidates: Tensor,
    value: Tensor,
    value_scale: Tensor,
    open_sum: Tensor,
    open_count: Tensor,
    left: Tensor | None,
    cluster_scores: Tensor | None,
    bias: Tensor | None,
    correction: Tensor | None,
    scaling: float,
) -> Partial:
    group, clusters = scores.shape[2], ends.shape[-1]
    ends = ends if ends.dim() == 4 else ends.unsqueeze(2).expand(-1, -1, group, -1)
    number = torch.arange(scores.shape[-1], device=scores.device).expand(scores.shape)
    owner = torch.searchsorted(ends.contiguous(), number.contiguous(), right=True)
    own = scores.float().masked_fill(number >= candidates.view(-1, 1, 1, 1), -torch.inf)
    highest = own.amax(-1, keepdim=True)
    if left is not None and cluster_scores is not None:
        left = left if left.dim() == 4 else left.unsqueeze(2)
        coarse = cluster_scores.float().masked_fill(left <= 0, -torch.inf)
        highest = torch.maximum(highest, coarse.amax(-1, keepdim=True))
    highest = highest.clamp_min(torch.finfo(torch.float32).min)
    mass = own.new_zeros(*own.shape[:3], clusters + 1).scatter_add_(-1, owner, (own - highest).exp())
    if left is not None:
        mass[..., :clusters] += left.clamp_min(0) * (coarse - highest).exp()
    there = (mass[..., :clusters] > 0).any(2).unsqueeze(-1)
    of_open = open_sum / open_count.clamp_min(1).view(-1, 1, 1)
    values = torch.cat(
        ((value.float() * value_scale.float().unsqueeze(-1)).masked_fill(~there, 0), of_open.unsqueeze(2)), 2
    )
    total = mass.sum(-1, keepdim=True)
    lse = total.log() + highest
    if bias is not None:
        lse = lse + scaling * bias.amax(-1, keepdim=True).unsqueeze(-1)
    if correction is not None:
        lse = lse + correction.view(-1, 1, 1)
    out = mass @ values / torch.where(total > 0, total, 1.0)
    return out.unsqueeze(3), lse
