"""Projections for a group of layers that shares keys and values, in closed form: where its training starts.

The input x of the storing layer's attention tells most of what the reading layers' keys and values are: layer l's are
W_l x_l, and M_l = E[x_l xᵀ] E[x xᵀ]⁻¹ predicts x_l from x. So a KV head has a target W_l M_l x for every layer, and
D dimensions for all of them. What a layer's own weights can absorb costs nothing:

- Values: any D × D map back, as the output projections O of the heads that read them are linear. The best D dimensions
  are the leading left singular vectors of the stacked Q_l^{1/2} W_l M_l E[x xᵀ]^{1/2}, with Q_l = Σ OᵀO over the heads
  of the group, which weighs an error in a value as the output does (Eckart and Young).
- Keys: what commutes with the rotary embedding, and so can be left to the queries. In a plane that it rotates that is a
  complex factor: the plane is one complex number of every layer, and the best is the first principal component of
  those, weighted by the energy of the queries there. Dimensions that it leaves alone are as values, with P_l = E[q qᵀ].

Moments are weighted by the attention that tokens receive: an error in a token's score or value reaches the output as
far as the token is attended to. The first token, which few others resemble, is what many heads mostly attend to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_RIDGE = 1e-4
"""Of E[x xᵀ], relative to the mean of its diagonal: keeps directions that the text hardly has from deciding."""
_FLOOR = 1e-9
"""Smallest eigenvalue of a metric, relative to its largest."""


@dataclass(frozen=True)
class LayerWeights:
    """What a layer's attention multiplies with, float64; inputs end with 1 where a projection has a bias."""

    key: Tensor
    """[Hkv, D, E]."""
    value: Tensor
    """[Hkv, Dv, E]."""
    output: Tensor
    """[Hkv, G, E, Dv]: the columns of each query head."""


@dataclass(frozen=True)
class LayerMoments:
    """Of one layer of a group, float64."""

    cross: Tensor
    """[E, E] Σ x_l xᵀ over tokens, weighted by the attention that they receive in all layers of the group; x is the
    storing layer's input."""
    query: Tensor
    """[Hkv, D, D] Σ q qᵀ before the rotary embedding, over the tokens and the G heads of a KV head."""


@dataclass(frozen=True)
class Fitted:
    """Of one group; queries and outputs by layer, as maps on the left of what each layer had."""

    key: Tensor
    """[Hkv, D, E], of the storing layer's input."""
    value: Tensor
    """[Hkv, Dv, E]."""
    query_maps: tuple[Tensor, ...]
    """[Hkv, D, D] for each layer: a query head q becomes `query_map @ q`."""
    value_maps: tuple[Tensor, ...]
    """[Hkv, Dv, Dv] for each layer: its values are about `value_map @ shared`."""


def fit_group(weights: Sequence[LayerWeights], moments: Sequence[LayerMoments], rotary_dims: int) -> Fitted:
    """Shared keys and values of a group, the storing layer first.

    Args:
        rotary_dims: of a head's dimensions the first so many are rotated, i paired with i + rotary_dims / 2.
    """
    second = moments[0].cross
    second = second + _RIDGE * second.diagonal().mean() * torch.eye(len(second), dtype=second.dtype)
    predict = [torch.linalg.solve(second, layer.cross.mT).mT for layer in moments]
    predict[0] = torch.eye(len(second), dtype=second.dtype)
    keys, values, query_maps, value_maps = [], [], [], []
    for head in range(len(weights[0].key)):
        targets = [layer.value[head] @ m for layer, m in zip(weights, predict, strict=True)]
        metrics = [torch.einsum("ged,gef->df", layer.output[head], layer.output[head]) for layer in weights]
        value, maps = shared_rows(targets, metrics, second)
        values.append(value)
        value_maps.append(torch.stack(maps))
        targets = [layer.key[head] @ m for layer, m in zip(weights, predict, strict=True)]
        energies = [layer.query[head] for layer in moments]
        key, maps = shared_keys(targets, energies, second, rotary_dims)
        keys.append(key)
        query_maps.append(torch.stack([made.mT for made in maps]))
    by_layer = range(len(weights))
    return Fitted(
        torch.stack(keys),
        torch.stack(values),
        tuple(torch.stack([maps[layer] for maps in query_maps]) for layer in by_layer),
        tuple(torch.stack([maps[layer] for maps in value_maps]) for layer in by_layer),
    )


def shared_rows(targets: Sequence[Tensor], metrics: Sequence[Tensor], second: Tensor) -> tuple[Tensor, list[Tensor]]:
    """D rows S and maps B_l with the least Σ_l E‖metric_l^{1/2} (T_l x - B_l S x)‖².

    Args:
        targets: [D, E] of each layer.
        metrics: [D, D], positive semi-definite.
        second: [E, E], E[x xᵀ].

    Returns:
        (S [D, E], B_l [D, D]); S is as near to the first target as a rotation and a factor bring it.
    """
    roots = [root_of(metric) for metric in metrics]
    stacked = torch.cat([root @ target for (root, _), target in zip(roots, targets, strict=True)])
    dims = targets[0].shape[0]
    basis = torch.linalg.eigh(stacked @ second @ stacked.mT)[1][:, -dims:]
    maps = [inverse @ part for (_, inverse), part in zip(roots, basis.split(dims), strict=True)]
    left, sizes, right = torch.linalg.svd(maps[0])
    turn, size = left @ right, float(sizes.square().mean().sqrt()) or 1.0
    return size * turn @ basis.mT @ stacked, [made @ turn.mT / size for made in maps]


def shared_keys(
    targets: Sequence[Tensor], energies: Sequence[Tensor], second: Tensor, rotary_dims: int
) -> tuple[Tensor, list[Tensor]]:
    """(shared key [D, E], maps [D, D] with k_l about map_l @ shared) that commute with the rotary embedding."""
    dims, half = targets[0].shape[0], rotary_dims // 2
    maps = [torch.zeros(dims, dims, dtype=second.dtype) for _ in targets]
    parts = []
    if half:
        planes, factors = _shared_planes(
            torch.stack([torch.complex(target[:half], target[half:rotary_dims]) for target in targets]),
            torch.stack([(energy.diagonal()[:half] + energy.diagonal()[half:rotary_dims]) for energy in energies]),
            second,
        )
        parts = [planes.real, planes.imag]
        first, last = torch.arange(half), torch.arange(half, rotary_dims)
        for made, factor in zip(maps, factors, strict=True):
            made[first, first] = made[last, last] = factor.real
            made[first, last], made[last, first] = -factor.imag, factor.imag
    if rotary_dims < dims:
        rest = slice(rotary_dims, dims)
        rows, own = shared_rows([target[rest] for target in targets], [e[rest, rest] for e in energies], second)
        parts.append(rows)
        for made, part in zip(maps, own, strict=True):
            made[rest, rest] = part
    return torch.cat(parts), maps


def _shared_planes(targets: Tensor, energies: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Complex rows s [P, E] and factors f [L, P] with the least Σ_l energy_l E|t_l x - f_l s x|² in every plane.

    Args:
        targets: [L, P, E] complex.
        energies: [L, P], of the queries.
    """
    weight = energies.clamp_min(_FLOOR * (float(energies.max()) or 1.0)).sqrt()
    weighted = (weight.unsqueeze(-1) * targets).transpose(0, 1)  # [P, L, E]
    covariance = weighted @ second.to(weighted.dtype) @ weighted.mH
    leading = torch.linalg.eigh(covariance)[1][..., -1]  # [P, L]
    own = leading[:, :1]
    # A factor of modulus 1 is free: the storing layer's keys keep their phase.
    leading = leading * torch.where(own.abs() > _FLOOR, own.conj() / own.abs().clamp_min(_FLOOR), 1)
    size = weight.norm(dim=0)  # layers with the same keys keep them as they are
    rows = (leading.conj().unsqueeze(1) @ weighted).squeeze(1) / size.unsqueeze(-1)
    return rows, leading.mT * size / weight


def root_of(metric: Tensor) -> tuple[Tensor, Tensor]:
    """(metric^{1/2}, its inverse) of a positive semi-definite matrix, its smallest eigenvalues raised."""
    squares, vectors = torch.linalg.eigh(metric)
    squares = squares.clamp_min(_FLOOR * (float(squares[-1]) or 1.0))
    roots = squares.sqrt()
    return vectors * roots @ vectors.mT, vectors / roots @ vectors.mT
