"""How alike the keys, or the values, of two layers are: unaligned, and after the best linear alignment.

The alignment predicts all heads of one layer from all heads of the other, by ridge regression on half of the tokens
for the other half, and the other way round: every token is predicted by a map that has not seen it, so that many
dimensions and few tokens do not flatter. The ridge is chosen by generalised cross-validation (Golub, Heath and Wahba
1979) on the half that the map is fitted on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_RIDGES = tuple(10.0**power for power in range(-8, 3))
"""Relative to the mean square of the singular values."""


@dataclass(frozen=True)
class Likeness:
    r2: float
    """1 - ‖target - predicted‖² / ‖target - its mean‖² on held-out tokens; at most 1, below 0 where the map of one
    half is worse than the mean on the other."""
    r2_unaligned: float
    """The same with the source itself as the prediction; mostly far below 0."""
    predicted: Tensor
    """[H, N, D] float32: the target from the source, each token by the map of the other half."""


class Source:
    """The keys or values of a layer that other layers' are predicted from, decomposed once for all of them.

    O(N d min(N, d)) for d = H · D; each `predict` is O(N d e).
    """

    def __init__(self, rows: Tensor):
        """
        Args:
            rows: [H, N, D], tokens in ascending order; the halves are the first and the second of the text.
        """
        self._flat = _flat(rows)
        half = len(self._flat) // 2
        first, second = slice(0, half), slice(half, None)
        halves = ((first, second), (second, first))
        self._folds = [(fit, unseen, _Decomposition(self._flat[fit])) for fit, unseen in halves]

    def predict(self, target: Tensor) -> Likeness:
        """
        Args:
            target: [H', N, D'], the same tokens in another layer.
        """
        flat = _flat(target)
        predicted = torch.empty_like(flat)
        for fit, unseen, decomposition in self._folds:
            predicted[unseen] = decomposition.predict(flat[fit], self._flat[unseen])
        spread = (flat - flat.mean(0)).square().sum()
        unaligned = float("nan")
        if self._flat.shape == flat.shape:
            unaligned = _r2(flat - self._flat, spread)
        heads = target.shape[0]
        return Likeness(
            r2=_r2(flat - predicted, spread),
            r2_unaligned=unaligned,
            predicted=predicted.unflatten(1, (heads, -1)).transpose(0, 1).float().contiguous(),
        )


class _Decomposition:
    """X - mean = U diag(s) Vᵀ of the rows [n, d] to fit on, through the smaller of the two Gram matrices."""

    def __init__(self, rows: Tensor):
        self._mean = rows.mean(0)
        centred = rows - self._mean
        if len(rows) >= rows.shape[1]:
            squares, right = torch.linalg.eigh(centred.T @ centred)
            keep = squares > 1e-12 * squares[-1]
            self._squares, self._right = squares[keep], right[:, keep]
            self._left = centred @ self._right / self._squares.sqrt()
        else:
            squares, left = torch.linalg.eigh(centred @ centred.T)
            keep = squares > 1e-12 * squares[-1]
            self._squares, self._left = squares[keep], left[:, keep]
            self._right = centred.T @ self._left / self._squares.sqrt()

    def predict(self, target: Tensor, rows: Tensor) -> Tensor:
        """The ridge regression of `target` [n, e] on the fitted rows, at new rows [m, d]."""
        mean = target.mean(0)
        if not len(self._squares):
            return mean.expand(len(rows), -1)
        centred = target - mean
        loadings = self._left.T @ centred
        shrunk = self._shrinkage(centred, loadings) / self._squares.sqrt()
        return mean + ((rows - self._mean) @ self._right) @ (shrunk.unsqueeze(1) * loadings)

    def _shrinkage(self, centred: Tensor, loadings: Tensor) -> Tensor:
        """[rank] s² / (s² + λ) for the λ with the least n · RSS / (n - degrees of freedom)²."""
        energy = loadings.square().sum(1)
        outside = (centred.square().sum() - energy.sum()).clamp_min(0)
        best, least = None, float("inf")
        for ridge in _RIDGES:
            shrinkage = self._squares / (self._squares + ridge * self._squares.mean())
            left_over = outside + ((1 - shrinkage).square() * energy).sum()
            freedom = len(centred) - 1 - float(shrinkage.sum())
            if freedom <= 0:
                continue
            score = float(left_over) / freedom**2
            # An exact fit leaves rounding only, which grows with every ridge: the smallest wins.
            if score < least:
                best, least = shrinkage, score
        assert best is not None, "the largest ridge leaves nearly all degrees of freedom"
        return best


def _flat(rows: Tensor) -> Tensor:
    """[H, N, D] -> [N, H · D] in double precision."""
    return rows.transpose(0, 1).flatten(1).double()


def _r2(error: Tensor, spread: Tensor) -> float:
    """Constant targets are predicted perfectly or not at all."""
    squared = error.square().sum()
    return float(1 - squared / spread) if spread > 0 else float(squared == 0)
