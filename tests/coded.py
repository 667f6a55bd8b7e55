"""An artifact for methods that code keys: random moments of queries and keys, the bases of these, and codewords."""

from __future__ import annotations

import functools
from dataclasses import replace

import samples
import torch
from torch import Tensor

from kvcal.artifacts import Artifact, Stage
from kvcal.calibrate.cla.group_fit import Rows, fit_group
from kvcal.calibrate.moments import Moments
from kvcal.calibrate.pca import fit_pca, spectrum
from kvcal.calibrate.score_basis import fit_score_basis

COUNT = 1000
CODEWORDS = 8


@functools.cache
def artifact(dim: int, kv_heads: int, value_dim: int | None = None) -> Artifact:
    """One layer. Keys have a mean and a falling spectrum, queries another; before and after rotation they differ."""
    generator = torch.Generator().manual_seed(dim + kv_heads)
    moments: dict[str, Tensor] = {}
    pca: dict[str, Tensor] = {}
    score: dict[str, Tensor] = {}
    for stage in ("pre", "post"):
        keys, queries = (_moments(generator, kv_heads, dim, size) for size in (1.0, 1.5))
        for name, of in (("key", keys), ("query", queries)):
            moments[f"layers.0.{name}_{stage}.mean"] = of.mean
            moments[f"layers.0.{name}_{stage}.covariance"] = of.covariance
        prefix, fitted = f"layers.0.key_{stage}", fit_pca(keys)
        pca[f"{prefix}.mean"], pca[f"{prefix}.components"] = fitted.mean.float(), fitted.components.float()
        for suffix, centred in (("eigenvalues", True), ("eigenvalues_uncentred", False)):
            pca[f"{prefix}.{suffix}"] = spectrum(keys, centred=centred)
        best = fit_score_basis(queries, keys)
        score[f"layers.0.{stage}.query_map"] = best.query_map.float()
        score[f"layers.0.{stage}.key_map"] = best.key_map.float()
        score[f"layers.0.{stage}.singular_values"] = best.singular_values
    drawn = torch.randn(kv_heads, CODEWORDS, dim + (value_dim or dim), generator=generator)
    codebook = {
        "layers.0.key": drawn[..., :dim],
        "layers.0.value": drawn[..., dim:],
        "layers.0.spread": torch.ones(kv_heads, 2),
        **{
            f"layers.0.code.{name}": score[f"layers.0.post.{name}"]
            for name in ("query_map", "key_map", "singular_values")
        },
    }
    stages = {"moments": Stage(moments), "pca": Stage(pca), "score": Stage(score), "codebook": Stage(codebook)}
    stages["xcla"] = _group_codes(generator, kv_heads, dim, value_dim or dim)
    return replace(samples.artifact(layers=1, head_dim=dim), stages=stages)


def _group_codes(generator: torch.Generator, heads: int, dim: int, value_dim: int) -> Stage:
    """Of one layer by itself, in 8 bits: where two ways to the same row round otherwise, few levels would be far
    apart."""
    tensors = {
        "layers.0.earlier": torch.zeros(0).long(),
        "layers.0.told": torch.zeros(2).double(),
        "layers.0.lost": torch.zeros(2).double(),
    }
    tensors["angles"] = torch.logspace(0, -2, dim // 2, dtype=torch.float64)
    for kind, width in (("key", dim), ("value", value_dim)):
        rows = torch.randn(heads, COUNT, width, generator=generator, dtype=torch.float64)
        one = torch.eye(width, dtype=torch.float64).expand(heads, -1, -1)
        weight = torch.full((COUNT,), 1 / COUNT, dtype=torch.float64)
        code = fit_group([Rows(rows, one)], weight, level=0.0)[0].code
        named = {"offset": code.offset, "basis": code.basis, "back": code.back, "counts": torch.tensor(code.counts)}
        tensors |= {f"layers.0.{kind}.{name}": tensor for name, tensor in named.items()}
    return Stage(tensors)


def _moments(generator: torch.Generator, heads: int, dim: int, size: float) -> Moments:
    axes = torch.linalg.qr(torch.randn(heads, dim, dim, generator=generator, dtype=torch.float64)).Q
    spread = size * torch.linspace(1.5, 0.3, dim, dtype=torch.float64)
    mean = 0.4 * torch.randn(heads, dim, generator=generator, dtype=torch.float64)
    return Moments(COUNT, mean, axes @ torch.diag(spread**2) @ axes.mT)
