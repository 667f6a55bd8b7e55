"""A codebook of key-value pairs per KV head: k-means of calibration keys and values together.

A codeword is a key and a value, and a token belongs to the codeword that is nearest to its own key and value. That is
the coarse quantiser of inverted files (Jégou, Douze and Schmid 2011) for attention, where two tokens are alike when
their logits and what they contribute are alike. With it is fitted the basis that is best for the scores of what a
codeword leaves of a key (residual quantisation).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..artifacts.errors import KvcalError
from .clustering import assign, finite, kmeans, measurable, one_thread
from .moments import Moments
from .score_basis import ScoreBasis, fit_score_basis


@dataclass(frozen=True)
class Codebook:
    """The codebooks of one layer, codewords in descending order of size."""

    key: Tensor
    """[Hkv, C, D] float32, after the rotary embedding: mean of its tokens' keys, as far as k-means has converged."""
    value: Tensor
    """[Hkv, C, Dv] float32, likewise."""
    spread: Tensor
    """[Hkv, 2] float32, above 0: what distances between keys, and between values, are divided by."""
    sizes: Tensor
    """[Hkv, C] int64, sampled tokens that are nearest to each codeword."""

    def assign(self, key: Tensor, value: Tensor) -> Tensor:
        """[Hkv, N] int64: the codeword nearest to each token of key [Hkv, N, D] and value [Hkv, N, Dv]."""
        pairs = zip(joint(key, value, self.spread), joint(self.key, self.value, self.spread), strict=True)
        return torch.stack([assign(points, codewords, "l2") for points, codewords in pairs])

    def beyond(self, key: Tensor, ids: Tensor) -> Tensor:
        """[Hkv, N, D] float64: what codewords leave of keys; ids [Hkv, N] are the tokens' codewords."""
        return key.double() - _taken(self.key, ids).double()


def fit_codebook(
    key: Tensor, value: Tensor, spread: Tensor, *, codewords: int, iterations: int = 20, seed: int = 0, where: str = ""
) -> Codebook:
    """faiss k-means of keys and values together, each divided by its spread.

    Args:
        key, value: [Hkv, N, D] after the rotary embedding, and [Hkv, N, Dv]; any device and dtype.
        spread: [Hkv, 2], see `spread_of`.
        where: "layer 3", for errors.

    Raises:
        KvcalError: fewer tokens than codewords; NaN or infinity.
    """
    key, value = finite(key, "keys", where), finite(value, "values", where)
    place = f" ({where})" if where else ""
    if iterations < 1:
        raise KvcalError(f"{iterations} iterations{place}: give at least 1")
    if not 1 <= codewords <= key.shape[1]:
        raise KvcalError(
            f"{codewords} codewords of {key.shape[1]} sampled tokens{place}: ask for 1 to {key.shape[1]}, or calibrate "
            "with a larger --reservoir"
        )
    points = joint(key, value, spread)
    measurable(points, where)
    with one_thread():
        centroids = torch.stack([kmeans(head, codewords, "l2", iterations, seed)[0] for head in points])
        centroids = centroids * _dims(spread, key.shape[-1], value.shape[-1])
        # Tokens are counted by the codewords as they are kept: their rounding may give a token to another one.
        unsorted = _codebook(centroids, spread, key.shape[-1])
        ids = unsorted.assign(key, value)
        sizes = torch.stack([torch.bincount(head, minlength=codewords) for head in ids])
        order = sizes.argsort(dim=-1, descending=True, stable=True)
        centroids = centroids.gather(1, order.unsqueeze(-1).expand_as(centroids))
    return replace(_codebook(centroids, spread, key.shape[-1]), sizes=sizes.gather(1, order))


def _codebook(centroids: Tensor, spread: Tensor, key_dims: int) -> Codebook:
    """A codebook whose sizes are not counted yet.

    Args:
        centroids: [Hkv, C, D + Dv].
    """
    key, value = (part.contiguous() for part in centroids.split([key_dims, centroids.shape[-1] - key_dims], -1))
    return Codebook(key, value, spread, torch.zeros(centroids.shape[:2], dtype=torch.int64))


def fit_code_basis(codebook: Codebook, queries: Moments, key: Tensor, value: Tensor) -> ScoreBasis:
    """The basis that is optimal for q·(k − codeword), from queries' moments and sampled keys and values."""
    return fit_score_basis(queries, code_moments(codebook, key, value))


def code_moments(codebook: Codebook, key: Tensor, value: Tensor) -> Moments:
    """Moments of what codewords leave of sampled keys."""
    beyond = codebook.beyond(key, codebook.assign(key, value))
    mean = beyond.mean(1)
    centred = beyond - mean.unsqueeze(1)
    return Moments(beyond.shape[1], mean, centred.mT @ centred / beyond.shape[1])


def unexplained(codebook: Codebook, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """What codewords leave of the variance of keys and of values, each [Hkv] float64: 0 is nothing, 1 all of it."""
    ids = codebook.assign(key, value)
    return _share(codebook.beyond(key, ids), key), _share(value.double() - _taken(codebook.value, ids), value)


def spread_of(key_covariance: Tensor, value_covariance: Tensor) -> Tensor:
    """[Hkv, 2] float32: root of the mean variance of the dimensions of keys [Hkv, D, D] and of values [Hkv, Dv, Dv];
    1 where nothing varies."""
    variance = [matrix.diagonal(dim1=-2, dim2=-1).mean(-1) for matrix in (key_covariance, value_covariance)]
    spread = torch.stack(variance, -1).clamp_min(0).sqrt().float()
    return spread.where(spread > 0, 1.0)


def joint(key: Tensor, value: Tensor, spread: Tensor) -> Tensor:
    """[Hkv, N, D + Dv] float32: the points that are clustered."""
    return torch.cat((key.float(), value.float()), -1) / _dims(spread, key.shape[-1], value.shape[-1])


def _dims(spread: Tensor, key_dims: int, value_dims: int) -> Tensor:
    """[Hkv, 1, D + Dv]: the spread of each dimension."""
    return spread.repeat_interleave(torch.tensor([key_dims, value_dims]), 1).unsqueeze(1)


def _taken(codewords: Tensor, ids: Tensor) -> Tensor:
    """[Hkv, N, D]: the codewords [Hkv, C, D] that ids [Hkv, N] name."""
    return codewords.gather(1, ids.unsqueeze(-1).expand(-1, -1, codewords.shape[-1]))


def _share(beyond: Tensor, whole: Tensor) -> Tensor:
    centred = whole.double() - whole.double().mean(1, keepdim=True)
    total = centred.square().sum((1, 2))
    return beyond.square().sum((1, 2)) / total.where(total > 0, 1.0)
