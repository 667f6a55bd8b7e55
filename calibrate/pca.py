"""Principal components of keys, per KV head (Loki, Singhania et al. 2024, section 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .moments import Moments


@dataclass(frozen=True)
class PCA:
    """Principal components of H heads."""

    mean: Tensor
    """[H, D] float64."""
    components: Tensor
    """[H, D, D] float64, orthonormal rows, descending variance; each row's largest entry is positive."""
    eigenvalues: Tensor
    """[H, D] float64, absolute variance along each component, descending, not negative."""
    centred: bool


def fit_pca(moments: Moments, *, centred: bool = True) -> PCA:
    """Eigen-decompose the covariance (n - 1, as scikit-learn) or, uncentred, the second moment (n)."""
    ascending, vectors = torch.linalg.eigh(_matrix(moments, centred))
    components = fix_signs(vectors.mT.flip(-2))
    return PCA(moments.mean, components, ascending.flip(-1).clamp_min(0), centred)


def spectrum(moments: Moments, *, centred: bool = True) -> Tensor:
    """[H, D] float64 eigenvalues alone, as `fit_pca` gives them."""
    return torch.linalg.eigvalsh(_matrix(moments, centred)).flip(-1).clamp_min(0)


def _matrix(moments: Moments, centred: bool) -> Tensor:
    if not centred:
        return moments.second_moment
    return moments.covariance * (moments.count / (moments.count - 1))


def fix_signs(rows: Tensor) -> Tensor:
    """Flip each row [..., D] so that its entry of largest magnitude is positive."""
    largest = rows.gather(-1, rows.abs().argmax(-1, keepdim=True))
    return rows * torch.where(largest < 0, -1.0, 1.0).to(rows.dtype)


def principal_angles(rows_a: Tensor, rows_b: Tensor) -> Tensor:
    """Angles in radians, ascending, between the spans of orthonormal rows [..., r, D]: [..., r].

    By sines where those are exact and cosines elsewhere (Björck & Golub 1973), so that equal
    subspaces give angles near 1e-16 and not 1e-8.
    """
    rows_a, rows_b = rows_a.to(torch.float64), rows_b.to(torch.float64)
    overlap = rows_a @ rows_b.mT
    cosines = torch.linalg.svdvals(overlap).clamp(max=1)
    outside = rows_b - overlap.mT @ rows_a
    sines = torch.linalg.svdvals(outside)[..., : cosines.shape[-1]].flip(-1).clamp(max=1)
    return torch.where(cosines**2 > 0.5, torch.asin(sines), torch.acos(cosines))
