"""The low-rank basis that is optimal for q·k rather than for k.

For independent q and k, E(q·k - q̂·k̂)² over all rank-r bilinear forms is least for the truncated SVD

    Σq^{1/2} Σk^{1/2} = U S Vᵀ,    q̂ = A_rᵀ q,  k̂ = B_rᵀ k,  A Bᵀ = Σq^{-1/2} U S Vᵀ Σk^{-1/2}

by Eckart-Young in the whitened space. Keys are centred (their mean moves all scores of a query
alike and cannot change a ranking), queries are not. No inverse is needed: Σq^{-1/2} U = Σk^{1/2} V S^{-1}.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .moments import Moments


@dataclass(frozen=True)
class ScoreBasis:
    """Two maps whose first r rows give the best rank-r scores: q·k ≈ (query_map[:r] q)·(key_map[:r] k)."""

    query_map: Tensor
    """[H, D, D] float64, rows in descending order of singular value, balanced with `key_map`."""
    key_map: Tensor
    """[H, D, D] float64."""
    singular_values: Tensor
    """[H, D] float64; their squares beyond r sum to the expected squared score error at rank r."""


def fit_score_basis(queries: Moments, keys: Moments) -> ScoreBasis:
    """Moments of the group's queries and of the keys, of one rotary stage, for H heads."""
    query_root = _square_root(queries.second_moment)
    key_root = _square_root(keys.covariance)
    left, values, right_t = torch.linalg.svd(query_root @ key_root)
    largest = left.mT.gather(-1, left.mT.abs().argmax(-1, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(left.dtype)
    # Directions that no score needs (rank-deficient moments) get zero rows instead of a division by zero.
    negligible = values <= values[..., :1] * values.shape[-1] * torch.finfo(values.dtype).eps
    scale = torch.where(negligible, 0.0, values.clamp_min(torch.finfo(values.dtype).tiny).rsqrt()).unsqueeze(-1)
    query_map = scale * signs * (right_t @ key_root)
    key_map = scale * signs * (left.mT @ query_root)
    return ScoreBasis(query_map, key_map, values)


def expected_score_error(queries: Moments, keys: Moments, query_rows: Tensor, key_rows: Tensor) -> Tensor:
    """[H] expected squared error of scores when q·k is replaced by (query_rows q)·(key_rows k), [H, r, D] each."""
    form = torch.eye(keys.mean.shape[-1], dtype=torch.float64) - query_rows.mT @ key_rows
    # E(qᵀ F k)² = tr(Fᵀ Σq F Σk)
    return torch.einsum("hij,hik,hkl,hlj->h", form, queries.second_moment, form, keys.covariance)


def _square_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt().unsqueeze(-2)) @ vectors.mT
