"""Fits the codes of a group of layers (`runtime/cla/group_code.py`) to sampled keys and values.

Layer by layer: what the coefficients of the earlier layers, as they come back from their codes, tell of a row is the
best linear prediction of it. What they do not tell has the eigenvectors of its covariance as its basis, in the metric
of what an error costs: E[(q·Δk)²], scaled as logits are, for keys; ‖Δv‖² over the values' own variance for values.
Then Σ_i λ_i δ(b_i) is lost, with λ the eigenvalues and δ(b) what b bits lose of a normal distribution. It is least for
given bytes where bits go to a coefficient as long as the next one saves more than a level that is the same for all: for
keys and values of all layers and groups. Tokens count by the attention that they receive, as in `fitting`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.codes import rotation
from ...runtime.cla.group_code import BITS, RowCode
from .fitting import root_of

LOST = {0: 1.0, 2: 0.1188, 4: 0.01154, 8: 3e-5}
"""Of a normal distribution's variance by so many bits (Max 1960; 8 bits reach the largest of some 64 numbers)."""
STEP = 8
"""Coefficients of a kind of bits are multiples of it, where the head dim is one."""
_RIDGE = 1e-4
"""Of the covariance of the earlier layers' coefficients, relative to the mean of its diagonal."""


@dataclass(frozen=True)
class Rows:
    """Sampled keys, or values, of one layer, float64."""

    rows: Tensor
    """[Hkv, N, D]."""
    metric: Tensor
    """[Hkv, D, D], symmetric: dᵀ metric d is what an error d costs."""


@dataclass(frozen=True)
class Fit:
    """One layer's code of keys, or of values."""

    code: RowCode
    coefficients: Tensor
    """[Hkv, N, r] of the sample, as they come back."""
    told: float
    """Share of the rows' variance, as errors cost, that the earlier layers tell; mean of KV heads."""
    lost: float
    """Share of it that does not come back."""


def fit_group(layers: Sequence[Rows], weight: Tensor, level: float) -> list[Fit]:
    """Codes of keys, or of values, of a group's layers.

    Args:
        weight: [N] float64, of each token; they add up to 1.
        level: what a bit of a coefficient has to save at least.
    """
    heads, count = layers[0].rows.shape[:2]
    told = torch.zeros(heads, count, 0, dtype=torch.float64)
    found: list[Fit] = []
    for layer in layers:
        found.append(fit_rows(layer, told, weight, level))
        told = torch.cat((told, found[-1].coefficients), -1)
    return found


def fit_rows(layer: Rows, told: Tensor, weight: Tensor, level: float) -> Fit:
    """
    Args:
        told: [Hkv, N, R - r], coefficients of the group's earlier layers.
    """
    maps = predict(told, layer.rows, weight)
    offset = mean(layer.rows, weight) - (mean(told, weight) @ maps)
    left = layer.rows - offset - told @ maps
    covariance = (left * weight.unsqueeze(-1)).mT @ left
    spectra, downs, ups = [], [], []
    for own, metric in zip(covariance, layer.metric, strict=True):
        turn, back = root_of(metric)
        values, vectors = torch.linalg.eigh(turn @ own @ turn)
        vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()  # else they are arbitrary
        spectra.append(values.flip(0).clamp_min(0))
        downs.append(turn @ vectors.flip(1))
        ups.append(vectors.flip(1).mT @ back)
    spectrum = torch.stack(spectra).mean(0)
    counts = share_bits(spectrum, level)
    kept = sum(counts)
    # Few levels serve coefficients that are alike: those of the same bits are rotated among one another.
    spread = torch.block_diag(*(rotation(count) for count in counts if count))
    basis = (torch.stack(downs)[..., :kept] @ spread.mT).float()
    back = torch.cat((maps, spread @ torch.stack(ups)[:, :kept]), 1).float()
    code = RowCode(offset.squeeze(1).float(), basis, back, counts)
    coefficients = code.coefficients(*code.encode(layer.rows.float()[None], told.float()[None]))[0].double()
    told_share = 1 - cost_of(left, layer, weight) if told.shape[-1] else 0.0
    restored = code.restore(torch.cat((told, coefficients), -1).float()).double()
    return Fit(code, coefficients, told_share, cost_of(restored - layer.rows, layer, weight))


def cost_of(errors: Tensor, layer: Rows, weight: Tensor) -> float:
    """What errors [Hkv, N, D] in a layer's rows cost, over what the rows' own variance would; mean of KV heads."""
    own = layer.rows - mean(layer.rows, weight)
    costs = [((part @ layer.metric) * part).sum(-1) @ weight for part in (errors, own)]
    return float((costs[0] / costs[1].clamp_min(torch.finfo(weight.dtype).tiny)).mean())


def mean(rows: Tensor, weight: Tensor) -> Tensor:
    """[Hkv, 1, D]."""
    return (weight @ rows).unsqueeze(1)


def predict(told: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """[Hkv, R, D]: the linear map of `told` [Hkv, N, R], less its mean, that is nearest to `rows` [Hkv, N, D]."""
    told = told - mean(told, weight)
    if not told.shape[-1]:
        return rows.new_zeros(len(rows), 0, rows.shape[-1])
    weighted = (told * weight.unsqueeze(-1)).mT
    second = weighted @ told
    ridge = _RIDGE * second.diagonal(dim1=1, dim2=2).mean(-1)
    second = second + ridge.view(-1, 1, 1) * torch.eye(second.shape[-1], dtype=second.dtype)
    return torch.linalg.solve(second, weighted @ rows)


def share_bits(spectrum: Tensor, level: float) -> tuple[int, ...]:
    """How many coefficients get 8, 4 and 2 bits: a coefficient goes to more bits where each of these saves `level`.

    Args:
        spectrum: [D], descending.
    """
    dims = len(spectrum)
    step = STEP if dims % STEP == 0 else 4
    steps = zip((0, *BITS[:0:-1]), BITS[::-1], strict=True)  # 0 → 2, 2 → 4, 4 → 8 bits
    at_least = []
    for before, after in steps:
        saved = spectrum * (LOST[before] - LOST[after]) / (after - before)
        at_least.append(round(int((saved > level).sum()) / step) * step)
    most = dims // step * step
    two, four, eight = (min(count, most) for count in at_least)
    two = max(two, step)  # a row has some code
    four, eight = min(four, two), min(eight, four, two)
    return eight, four - eight, two - four
