"""Streaming first and second moments: what PCA, the score basis and rank statistics are derived from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Moments of H independent sets of D-dimensional samples, one set per KV head."""

    count: int
    mean: Tensor
    """[H, D] float64."""
    covariance: Tensor
    """[H, D, D] float64, centred, divided by `count`."""

    @property
    def second_moment(self) -> Tensor:
        """[H, D, D] float64, E[x xᵀ] without centring."""
        return self.covariance + self.mean.unsqueeze(-1) * self.mean.unsqueeze(-2)


class MomentsFitter:
    """Accumulates in float64 around the running mean (Chan, Golub & LeVeque 1979), so that a mean
    much larger than the spread, as in models with key biases, costs no digits."""

    def __init__(self, heads: int, dim: int):
        self.count = 0
        self.mean = torch.zeros(heads, dim, dtype=torch.float64)
        self.scatter = torch.zeros(heads, dim, dim, dtype=torch.float64)

    def update(self, samples: Tensor) -> None:
        """Take in `samples` [H, n, D] of any float dtype; n may be 0 and is the same for all heads."""
        if samples.shape[1] == 0:
            return
        mean = torch.empty(self.mean.shape, dtype=torch.float64, device=samples.device)
        scatter = torch.empty(self.scatter.shape, dtype=torch.float64, device=samples.device)
        # Head by head: on a CPU most of the time would go into the pages of large float64 temporaries.
        for head, rows in enumerate(samples):
            rows = rows.to(torch.float64, copy=True)
            torch.mean(rows, 0, out=mean[head])
            rows -= mean[head]
            torch.mm(rows.T, rows, out=scatter[head])
        self._combine(samples.shape[1], mean, scatter)

    def merge(self, other: MomentsFitter) -> None:
        """Take in everything that `other` has seen."""
        if other.count:
            self._combine(other.count, other.mean, other.scatter)

    def finalize(self) -> Moments:
        """The moments so far, as copies on the CPU: later updates do not reach them.

        Raises:
            ValueError: fewer than two samples, which have no covariance.
        """
        if self.count < 2:
            raise ValueError(f"moments of {self.count} samples: at least 2 are needed")
        return Moments(self.count, self.mean.cpu().clone(), (self.scatter / self.count).cpu())

    def _combine(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.count + count
        # The sums live where the samples do: on the layer's device.
        self.mean, self.scatter = self.mean.to(mean.device), self.scatter.to(mean.device)
        shift = mean - self.mean
        outer = shift.unsqueeze(-1) * shift.unsqueeze(-2)
        self.scatter += scatter + outer * (self.count * count / total)
        self.mean += shift * (count / total)
        self.count = total
