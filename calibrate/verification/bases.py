"""The stages `pca` and `score`, which are derived from the moments."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ...artifacts import QUANTITIES, Artifact
from ...artifacts.claims import require
from ...artifacts.values import negligible, score_rounding
from ..moments import Moments
from ..pca import spectrum
from ..score_basis import fit_score_basis
from .moments import ROUNDING, largest, moments_of

SINGLE = 1e-5
"""Allowed relative error: float32 rounds rows of a basis by 6e-8 of their length."""
OF_ROOTS = 1e-6
"""Allowed error relative to the largest singular value: roots of eigenvalues that should be zero are off by 1e-8."""


def check_pca(artifact: Artifact, where: str) -> None:
    """Eigenvalues, means and components are those of the moments, signs as agreed."""
    centred = artifact.settings.get("centred", True)
    for layer in artifact.layers:
        get = partial(artifact.tensor, "pca", layer.index)
        for quantity in QUANTITIES:
            name = f"layers.{layer.index}.{quantity}"
            moments = moments_of(artifact, layer, quantity) if "moments" in artifact.stages else None
            if moments is not None:
                for part in ("eigenvalues", "eigenvalues_uncentred"):
                    wanted = spectrum(moments, centred=part == "eigenvalues")
                    _check_spectrum(where, f"{name}.{part}", get(f"{quantity}.{part}"), wanted)
            if quantity.startswith("key"):
                _check_signs(where, f"{name}.components", get(f"{quantity}.components"))
            if moments is not None and quantity.startswith("key"):
                mean = get(f"{quantity}.mean")
                holds = (mean - moments.mean).abs() <= SINGLE * moments.mean.abs() + torch.finfo(mean.dtype).tiny
                require(where, f"{name}.mean", holds, mean, "the mean in the stage moments")
                values = get(f"{quantity}.{'eigenvalues' if centred else 'eigenvalues_uncentred'}")
                rows = get(f"{quantity}.components")
                _check_components(where, f"{name}.components", rows, values, moments, bool(centred))


def check_score(artifact: Artifact, where: str) -> None:
    """Both maps and the singular values are those of the moments of queries and keys."""
    if "moments" not in artifact.stages:
        return
    for layer in artifact.layers:
        for rotary_stage in ("pre", "post"):
            name = f"layers.{layer.index}.{rotary_stage}"
            query_map, key_map, values = (
                artifact.tensor("score", layer.index, f"{rotary_stage}.{part}").double()
                for part in ("query_map", "key_map", "singular_values")
            )
            queries, keys = (moments_of(artifact, layer, f"{part}_{rotary_stage}") for part in ("query", "key"))
            check_maps(where, name, (query_map, key_map, values), queries, keys, "the stage moments")


def check_maps(where: str, name: str, found: Sequence[Tensor], queries: Moments, keys: Moments, source: str) -> None:
    """(query map, key map, singular values), float64, are those of these moments, which come from `source`."""
    query_map, key_map, values = found
    wanted = fit_score_basis(queries, keys).singular_values
    holds = (values - wanted).abs() <= OF_ROOTS * wanted[:, :1]
    require(where, f"{name}.singular_values", holds, values, f"that of {source}")
    _check_balanced(where, f"{name}.query_map", query_map, queries.second_moment, values, "queries'")
    _check_balanced(where, f"{name}.key_map", key_map, keys.covariance, values, "keys'")


def _check_spectrum(where: str, name: str, found: Tensor, wanted: Tensor) -> None:
    holds = (found - wanted).abs() <= ROUNDING * wanted[:, :1]
    require(where, name, holds, found, "that of the stage moments")


def _check_signs(where: str, name: str, rows: Tensor) -> None:
    """The largest entry of each row is positive; of two that are equally large but for rounding, one is."""
    highest = rows.amax(-1)
    require(where, name, highest >= (1 - SINGLE) * rows.abs().amax(-1), highest, "its row's largest entry, positive")


def _check_components(where: str, name: str, rows: Tensor, values: Tensor, moments: Moments, centred: bool) -> None:
    """The components make the covariance (n - 1), or the second moment (n), diagonal."""
    unbiased = moments.covariance * (moments.count / (moments.count - 1))
    matrix = unbiased if centred else moments.second_moment
    found = rows.double() @ matrix @ rows.double().mT
    holds = (found - torch.diag_embed(values)).abs() <= SINGLE * largest(matrix) * rows.shape[-1] ** 0.5
    what = "the eigenvalue on the diagonal and 0 elsewhere"
    require(where, f"{name} (times the covariance)", holds, found, what)


def _check_balanced(where: str, name: str, rows: Tensor, matrix: Tensor, values: Tensor, whose: str) -> None:
    """A map turns the second moment into the singular values."""
    found = rows @ matrix @ rows.mT
    length = rows.norm(dim=-1)
    allowed = SINGLE * torch.linalg.matrix_norm(matrix, 2).view(-1, 1, 1) * length.unsqueeze(-1) * length.unsqueeze(-2)
    allowed = allowed + values[:, :1, None] * score_rounding(values)
    wanted = torch.diag_embed(values.where(values > negligible(values), 0.0))
    what = "the singular value on the diagonal and 0 elsewhere"
    require(where, f"{name} (times the {whose} second moment)", (found - wanted).abs() <= allowed, found, what)
