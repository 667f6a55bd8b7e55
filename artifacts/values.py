"""Values that the runtime depends on, which `load` checks beside names, shapes and hashes.

`docs/format.md` promises them. `calibrate verify` checks what only the moments and the reservoir can tell: they are
most of an artifact, and `load` is to stay quick.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .artifact import Artifact, indices_in
from .claims import MOST, bounded, products, require, require_that, spectrum
from .cluster_values import check_clusters, check_codebook
from .group_values import check_group_codes
from .schema import QUANTITIES

Tensors = Mapping[str, Tensor]


def check_values(where: str, stage: str, tensors: Tensors, settings: Mapping[str, Any], artifact: Artifact) -> None:
    """Refuse a stage with values that would decode wrongly. Of `moments`, and of the reservoir's rows, nothing is read.

    Args:
        where: the file, for the error.
        tensors: of the names and shapes that `check_stage` allows.
        settings: of the stage.
        artifact: as the manifest describes it; its stages are not read.

    Raises:
        ArtifactError: the first value that does not hold: tensor, layer, KV head, value and expectation.
    """
    if stage == "reservoir":
        _check_tokens(where, tensors, artifact)
    if stage == "xcla":
        check_group_codes(where, tensors, artifact.layers)
    held = indices_in(tensors)
    for layer in artifact.layers:
        if layer.index not in held:
            continue  # of a stage that leaves out layers with a window; `check_stage` allows no other gaps
        prefix = f"layers.{layer.index}."
        if stage in ("pca", "cla"):
            _check_bases(where, tensors, prefix)
        if stage == "score":
            for rotary_stage in ("pre", "post"):
                check_maps(where, tensors, f"{prefix}{rotary_stage}.")
        if stage == "codebook":
            check_codebook(where, tensors, prefix, settings)
            check_maps(where, tensors, f"{prefix}code.")
        if stage == "clusters":
            check_clusters(where, tensors, prefix, settings)
        if stage == "cla":
            _check_costs(where, tensors, prefix)


def negligible(values: Tensor) -> Tensor:
    """[Hkv, 1] bound on singular values [Hkv, D]: up to it they are rounding, and maps have rows of zeros for them."""
    return values[:, :1] * values.shape[-1] * torch.finfo(torch.float64).eps


def score_rounding(values: Tensor) -> Tensor:
    """[Hkv, D, D] how far products of score maps may be off by the rounding of float64 alone.

    That rounding is relative to the largest singular value; maps divide each row by the root of its own value.
    """
    root = values.where(values > negligible(values), torch.inf).rsqrt()
    return 1e-12 * values[:, :1, None] * root.unsqueeze(-1) * root.unsqueeze(-2)


def _check_bases(where: str, tensors: Tensors, prefix: str) -> None:
    """Spectra of all quantities, means and components of keys, as far as the stage has them."""
    for quantity in QUANTITIES:
        for part in ("eigenvalues", "eigenvalues_uncentred"):
            if (name := f"{prefix}{quantity}.{part}") in tensors:
                spectrum(where, name, tensors[name])
        if (name := f"{prefix}{quantity}.mean") in tensors:
            bounded(where, name, tensors[name])
        if (name := f"{prefix}{quantity}.components") in tensors:
            rows = tensors[name]
            bounded(where, name, rows, -2, 2)
            what = "orthonormal rows, products of 1 and 0"
            products(where, f"{name} (times itself)", rows, rows, torch.eye(rows.shape[-1]), what)


def check_maps(where: str, tensors: Tensors, prefix: str) -> None:
    """The two maps of a score basis are inverse to one another."""
    names = [prefix + part for part in ("query_map", "key_map", "singular_values")]
    query_map, key_map, values = (tensors[name] for name in names)
    bounded(where, names[0], query_map)
    bounded(where, names[1], key_map)
    spectrum(where, names[2], values)
    one = torch.diag_embed((values > negligible(values)).float())
    what = "1 with its own row of key_map and 0 with others"
    more = partial(score_rounding, values)
    products(where, f"{names[0]} (times key_map)", query_map, key_map, one, what, more)


def _check_tokens(where: str, tensors: Tensors, artifact: Artifact) -> None:
    token, position = tensors["token"], tensors["position"]
    blocks, seq_len = artifact.data["blocks"], artifact.data["seq_len"]
    require_that(where, "token", len(token) > 0, "empty", "at least one token")
    inside = (token >= 0) & (token < min(blocks * seq_len, 1 << 62))
    require(where, "token", inside, token, f"0 to {blocks * seq_len - 1} ({blocks} blocks of {seq_len})", by_head=False)
    rises = torch.ones_like(inside)
    rises[1:] = token[1:] > token[:-1]
    require(where, "token", rises, token, "more than the entry before it", by_head=False)
    require(where, "position", position == token % seq_len, position, f"token modulo {seq_len}", by_head=False)


def _check_costs(where: str, tensors: Tensors, prefix: str) -> None:
    """What sharing costs: R² is at most 1, relative errors are at least 0."""
    for part in ("key_r2", "key_r2_unaligned", "value_r2", "value_r2_unaligned", "cost_as_is", "cost_aligned"):
        found = tensors[prefix + part]
        least, most = (0.0, MOST) if part.startswith("cost") else (-MOST, 1.0)
        holds = found.isnan() | ((found >= least) & (found <= most))
        expected = f"{least:g} to {most:g}, or NaN where it was not measured"
        require(where, prefix + part, holds, found, expected, by_head=False)
