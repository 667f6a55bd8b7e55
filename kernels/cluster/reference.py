"""The definition of `assign` and `update` in plain torch."""

import torch
from torch import Tensor

BLOCK = 1 << 18
"""Similarities at a time, few enough for the caches of a CPU: those of all tokens and clusters are never in memory."""


def assign(unit: Tensor, centroids: Tensor, lengths: Tensor, counts: Tensor, label: Tensor, similarity: Tensor) -> None:
    """Writes `label` and `similarity`, already checked; see `kvcal.kernels.cluster.assign`."""
    batch, heads, tokens, _ = unit.shape
    clusters = centroids.shape[2]
    absent = torch.arange(clusters, device=unit.device) >= counts.view(-1, 1, 1, 1)
    ragged = bool(absent.any())
    step = max(1, BLOCK // max(1, batch * heads * clusters))
    for begin in range(0, tokens, step):
        part = slice(begin, begin + step)
        products = unit[:, :, part].float() @ centroids.float().mT
        best = (products.masked_fill(absent, -torch.inf) if ragged else products).max(-1)
        similarity[:, :, part] = best.values
        label[:, :, part] = best.indices
    beyond = ~held(tokens, lengths)
    label.masked_fill_(beyond, -1)
    similarity.masked_fill_(beyond, 0.0)


def update(values: Tensor, labels: Tensor, lengths: Tensor, sums: Tensor, sizes: Tensor) -> None:
    """Writes `sums` and `sizes`, already checked; see `kvcal.kernels.cluster.update`."""
    count = sums.shape[2]
    counted = held(values.shape[2], lengths) & (labels >= 0) & (labels < count)
    index = labels.clamp(0, count - 1).long()
    sizes.zero_().scatter_add_(2, index, counted.to(sizes.dtype))
    whole = bool(counted.all())
    members = values.float() if whole else values.float().masked_fill(~counted.unsqueeze(-1), 0.0)
    pair = torch.arange(index.shape[0] * index.shape[1], device=index.device).view(*index.shape[:2], 1)
    place, dims = (index + count * pair).flatten(), values.shape[-1]
    sums.zero_().view(-1, dims).index_add_(0, place, members.reshape(-1, dims))


def held(tokens: int, lengths: Tensor) -> Tensor:
    """[B, 1, S] bool: within the sequence's length."""
    return torch.arange(tokens, device=lengths.device) < lengths.view(-1, 1, 1)
