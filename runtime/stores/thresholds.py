"""Thresholds that about k of a row's S scores reach, from calibration: no look at the other scores is needed.

The scores of a query q̂ (in the basis that scores) over keys of mean μ and covariance Σ have mean and deviation

    m = scaling · q̂·μ        s² = scaling² · q̂ᵀ Σ q̂

and the reservoir says, per KV head, how many deviations above the mean the upper p-quantile lies on average: z(p), on
a grid of log p. Then t = m + s · z(k / S). Keys after their rotary embedding depend on their positions, so μ, Σ and z
are functions of the length: of the keys before position S, as the queries near S see them, for lengths √2 apart.
In between, all three are interpolated in log S. Beyond the longest calibrated length its own are used, and beyond the
smallest p that the reservoir resolves, z goes on as a normal distribution's does.

A group that reads one choice of tokens by the largest logit of its G heads has the threshold max_g (m_g + s_g z): a
token of largest logit x reaches it if z <= min_g (x - m_g) / s_g, so z is the quantile of that, over groups of G
queries of the reservoir. It holds one query per token: those of neighbouring tokens stand for a token's G.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...artifacts import Artifact, KvcalError
from ..attention import Logits
from .basis import Basis

QUERIES = 256
"""Of the reservoir, per KV head, that the fit takes, shared out among the lengths."""
FEWEST_KEYS = 64
"""Keys before a length that is calibrated by itself."""
POINTS = 33
"""Of the grid of p."""
LEAST, MOST = 0.75, 1.5
"""A choice by a threshold is of at least and at most so many times the tokens wanted (docs/results/threshold.md)."""


@dataclass(frozen=True)
class Place:
    """Of each row: between which two lengths, and where on the grid of p."""

    below: Tensor
    """[B] int64, tables; `above` too."""
    above: Tensor
    share: Tensor
    """[B, 1, 1], from the lower to the upper."""
    points: Tensor
    """[B, P + 1, 1]: weights of the grid's points, linear in log p, and how far a normal quantile rises beyond them."""


@dataclass(frozen=True)
class Thresholds:
    """One object for all caches, in float32."""

    longest: int
    """The longest calibrated length, in tokens; there are J, each √2 of the one before."""
    tables: Tensor
    """[J, Hkv, r + r² + P + 1]: μ, Σ, z of each length, ascending, and 1; z descending, of p from `smallest` to 1."""
    rank: int
    smallest: float
    """The smallest p of the grid."""
    by_group: bool
    """For the largest logit of a group of query heads, else for each query head's own."""
    _moved: dict[torch.device, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def fit(cls, query: Tensor, key: Tensor, position: Tensor, group: int = 1) -> Thresholds:
        """From a sample of tokens.

        Args:
            query, key: [Hkv, N, r] float32, in the basis that scores; ordered by token.
            position: [N] int64, in their texts.
            group: G, query heads whose largest logit counts; 1: each for itself.

        Raises:
            KvcalError: too few tokens.
        """
        _, tokens, rank = key.shape
        if tokens < max(2, group):
            raise KvcalError(f"a reservoir of {tokens} tokens: thresholds need more, `calibrate pca --reservoir 4096`")
        longest = int(position.max()) + 1
        lengths = [float(longest)]
        while (position < (shorter := longest * 2 ** (-len(lengths) / 2))).sum() >= FEWEST_KEYS:
            lengths.append(shorter)
        smallest = min(0.5, 2 / tokens)
        shares = smallest ** torch.linspace(1, 0, POINTS)
        some = max(group, QUERIES // len(lengths) // group * group)
        tables = []
        for length in reversed(lengths):
            near = (position - length).abs().argsort(stable=True)[: min(some, tokens // group * group)].sort().values
            held = key[:, position < length]
            mean = held.mean(1)
            spread = held - mean.unsqueeze(1)
            covariance = spread.mT @ spread / held.shape[1]
            z = quantiles(standardised(query[:, near], held, mean, covariance, group), shares)
            tables.append(torch.cat((mean, covariance.flatten(1), z, torch.ones_like(z[:, :1])), -1))
        return cls(longest, torch.stack(tables), rank, smallest, group > 1)

    def of(self, query: Tensor, wanted: Tensor, seen: Tensor, logits: Logits) -> Tensor:
        """Thresholds that about `wanted` of `seen` scores reach; nothing waits for the device.

        Args:
            query: [B, Hkv, G, r], in the basis that scores.
            wanted, seen: [B] int32 on the same device.

        Returns:
            [B, Hkv, G] float32, by group [B, Hkv, 1].
        """
        return self.at(query, self.place(wanted, seen), logits)

    def at(self, query: Tensor, place: Place, logits: Logits) -> Tensor:
        """As `of`, at a place that all layers of a step share."""
        query, tables = query.float(), self._on(query.device)
        table = tables[place.below].lerp(tables[place.above], place.share)
        mean, covariance, z = table.split((self.rank, self.rank**2, POINTS + 1), -1)
        expected = (query @ mean.unsqueeze(-1)).squeeze(-1)
        variance = ((query @ covariance.unflatten(-1, (self.rank, self.rank))) * query).sum(-1)
        dots = expected.addcmul(variance.clamp_min(0).sqrt(), z @ place.points)
        thresholds = logits.of(dots)
        return thresholds.amax(2, keepdim=True) if self.by_group else thresholds

    def place(self, wanted: Tensor, seen: Tensor) -> Place:
        """Where rows stand among the lengths and on the grid; the same for all layers of an artifact."""
        last = len(self.tables) - 1
        level = ((seen / self.longest).log2() * 2 + last).clamp(0, last)
        below = level.long()
        share, end = wanted / seen, torch.full_like(level, self.smallest)
        at = (POINTS - 1) * (1 - share.clamp(self.smallest, 1).log() / math.log(self.smallest))
        points = torch.arange(POINTS, device=share.device)
        linear = (1 - (points - at.unsqueeze(-1)).abs()).clamp_min(0)
        beyond = torch.special.ndtri(end) - torch.special.ndtri(share.minimum(end))
        weights = torch.cat((linear, beyond.unsqueeze(-1)), -1)
        return Place(below, (below + 1).clamp_max(last), (level - below).view(-1, 1, 1), weights.unsqueeze(-1))

    @property
    def grid(self) -> tuple[int, int, float]:
        """Thresholds of the same grid have the same places."""
        return self.longest, len(self.tables), self.smallest

    def bytes_read(self, lengths: list[int]) -> int:
        """Of the tables of rows of these lengths: each lies between two."""
        return self.tables[0].nbytes * min(len(self.tables), 2 * len(set(lengths)))

    def _on(self, device: torch.device) -> Tensor:
        if device not in self._moved:
            self._moved[device] = self.tables.to(device)
        return self._moved[device]


def fit_layer(artifact: Artifact, layer: int, basis: Basis, by_group: bool) -> Thresholds:
    """Thresholds of a layer's scores in a basis, from the reservoir.

    Raises:
        KvcalError: the artifact has no reservoir, or too small a one.
    """
    query, key = (artifact.finite("reservoir", layer, f"{name}_post").float() for name in ("query", "key"))
    position = artifact.stages["reservoir"].tensors["position"]
    query_map, key_map = (each[:, : basis.rank].float() for each in basis.maps(query))
    of = artifact.layers[layer]
    group = of.query_heads // of.kv_heads if by_group else 1
    return Thresholds.fit(query @ query_map.mT, key @ key_map.mT, position, group)


def bounds(wanted: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """(least, most) tokens [B] int32 of a choice by a threshold; a row that is to be read whole is."""
    least, most = ((wanted * share).ceil().to(wanted.dtype) for share in (LEAST, MOST))
    return torch.where(wanted < seen, least, wanted), torch.minimum(most, seen)


def room(wanted: int, tokens: int) -> int:
    """The most that a choice of `wanted` of so many tokens takes."""
    return max(1, min(tokens, math.ceil(wanted * MOST)))


def standardised(query: Tensor, key: Tensor, mean: Tensor, covariance: Tensor, group: int) -> Tensor:
    """[Hkv, n, r], [Hkv, N, r] -> [Hkv, n / group, N]: deviations of each score above the mean that the moments
    predict; of a group's largest score, the least among its queries."""
    expected = (query @ mean.unsqueeze(-1)).unflatten(1, (-1, group))
    deviation = ((query @ covariance) * query).sum(-1, keepdim=True).sqrt().unflatten(1, (-1, group))
    largest = (query @ key.mT).unflatten(1, (-1, group)).amax(2, keepdim=True)
    return ((largest - expected) / deviation.clamp_min(torch.finfo(deviation.dtype).tiny)).amin(2)


def quantiles(values: Tensor, shares: Tensor) -> Tensor:
    """[Hkv, n, N], [P] -> [Hkv, P]: upper quantiles of the last dimension, the mean over n. The k-th largest is the
    quantile of (k - 1/2) / N."""
    count = values.shape[-1]
    falling = values.sort(-1, descending=True).values
    at = (shares * count - 0.5).clamp(0, count - 1)
    below = at.long()
    return falling[..., below].lerp(falling[..., (below + 1).clamp_max(count - 1)], at - below).mean(1)
