"""The definition of `score_runs` in plain torch."""

import torch
from torch import Tensor

from .quantize import unpack


def candidate_slots(
    starts: Tensor | None, ends: Tensor | None, begin: Tensor, end: Tensor, candidates: Tensor
) -> tuple[Tensor, Tensor]:
    """(slots int64 of the candidates numbered so [B, Hkv(, G), N], 0 where there are so few; bool, which there are).

    Args: others as of `kvcal.kernels.score.score_runs`.
    """
    rest = [1] * (candidates.dim() - 1)
    first, extent = begin.view(-1, *rest), (end - begin).clamp_min(0).view(-1, *rest)
    if starts is None or ends is None:
        within = candidates < extent
        return torch.where(within, first + candidates, 0).long(), within
    ends = ends if ends.dim() == candidates.dim() else ends.unsqueeze(2).expand(*candidates.shape[:3], -1)
    starts = starts if starts.dim() == candidates.dim() else starts.unsqueeze(2).expand(ends.shape)
    runs, total = ends.shape[-1], ends[..., -1:]
    run = torch.searchsorted(ends.contiguous(), candidates.contiguous(), right=True)
    before = ends.gather(-1, (run - 1).clamp_min(0)).where(run > 0, 0)
    of_run = starts.gather(-1, run.clamp_max(runs - 1)) + candidates - before
    slots = torch.where(run < runs, of_run, first + candidates - total)
    within = candidates < total + extent
    return slots.where(within, 0).long(), within


def score_runs(
    query: Tensor,
    codes: Tensor,
    scales: Tensor,
    starts: Tensor | None,
    ends: Tensor | None,
    begin: Tensor,
    end: Tensor,
    bias: Tensor | None,
    out: Tensor | None,
    best: Tensor | None,
    *,
    scaling: float,
    bits: int,
    softcap: float | None,
) -> None:
    """Writes `out` and `best`, already checked; see `kvcal.kernels.score.score_runs`."""
    batch, heads, group, _ = query.shape
    capacity = (out if best is None else best).shape[-1]  # type: ignore[union-attr]
    each = ends is not None and ends.dim() == 4
    number = torch.arange(capacity, device=query.device).expand(batch, heads, *([group] if each else []), -1)
    slots, within = candidate_slots(starts, ends, begin, end, number)
    row = torch.arange(batch, device=query.device).view(-1, *[1] * (slots.dim() - 1))
    head = torch.arange(heads, device=query.device).view(1, -1, *[1] * (slots.dim() - 2))
    held = unpack(codes[row, head, slots], bits)
    scale = scales[row, head, slots].float().where(within, 0)
    if each:
        logits = (held @ query.float().unsqueeze(-1)).squeeze(-1) * scale
    else:
        logits = (query.float() @ held.mT) * scale.unsqueeze(2)
        within = within.unsqueeze(2)
    if bias is not None:
        logits = logits + (bias if softcap is not None else bias - bias.amax(-1, keepdim=True)).unsqueeze(-1)
    logits = logits * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    largest = torch.finfo((out if best is None else best).dtype).max  # type: ignore[union-attr]
    logits = logits.clamp(-largest, largest).masked_fill(~within, -torch.inf)
    if out is not None:
        out.copy_(logits)
    if best is not None:
        best.copy_(logits.amax(2))
