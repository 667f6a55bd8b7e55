"""A simulation of `spectral`'s step in plain torch, over all decoded tokens of a layer at once, for what varies in it.

It has the step's tables, masks and rounding, but for page corrections, which are not coded in 8 bits. Layers with sink
logits are not simulated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvcal.artifacts import Artifact
from kvcal.calibrate.planning.points import Problem, relative_error
from kvcal.kernels.codes import decode, encode, nearest, rotation
from kvcal.runtime.methods.choosing import shared
from kvcal.runtime.methods.codewords import Codewords
from kvcal.runtime.methods.spectral import Spectral

from .settings import CODEWORDS, PAGE, index_of

LEVEL = 1 / 8
"""Of the bytes."""
CALIBRATED_WEIGHT = 16
"""Tokens as which the calibrated mean value counts beside those of the sequence, where the base is between the two."""
SINKS, RECENT = Spectral.sinks, Spectral.recent


@dataclass(frozen=True)
class Variation:
    codes: Sequence[tuple[float, int]] = ((1 / 2, 2),)
    """Groups of dimensions, the most important ones first: a share of the head dim, and bits of each dimension."""
    rotated: bool = True
    rows: int = 8
    """Bits of keys and values."""
    rounded: bool = False
    """Whether rows are turned by a matrix of bfloat16 numbers."""
    base: str = "codebook"
    """What stands for a token that is not read. "codebook": the calibrated mean value of its codeword. "sequence": that
    of the tokens before the decoded ones. "between": the mean of these two, weighted. "page": the mean value of its
    page. "nothing": it is left out."""
    pages: bool = True
    """Whether the base is corrected by the mean of what it leaves of the values of a full page."""
    select: str = Spectral.select
    """As in `shared`. With "head" each of the G query heads reads 1/G as many: a KV head reads as many in all."""
    by_mass: bool = False
    """Whether a KV head and step reads as many tokens as hold a share of the estimated mass, the same share everywhere
    and such that no more is read in all."""
    noise: float = 0.0
    """Times half of the mean square error of a query's estimated logits, added to those of what is not read."""

    def __post_init__(self) -> None:
        assert self.base in ("codebook", "sequence", "between", "page", "nothing"), self.base
        assert not self.by_mass or self.select == "group", "the mass is that of a group"

    @property
    def own_means(self) -> bool:
        """Whether the base is of each sequence."""
        return self.base in ("sequence", "between")

    def keep(self, head_dim: int, length: int) -> float:
        """Tokens that a KV head reads, of those that there are, for what the index leaves of the bytes."""
        codes = [(round(share * head_dim), bits) for share, bits in self.codes]
        left = LEVEL - index_of(codes, head_dim, length, pages=self.pages)
        if self.own_means:  # a table of each sequence, in 8 bits
            left -= CODEWORDS * (head_dim + 2) / length / (4 * head_dim)
        row = 4 * head_dim if self.rows == 16 else 2 * (head_dim * self.rows / 8 + 2)
        return left * 4 * head_dim / row


class Layer:
    """Shapes [B, Hkv, G, steps, T], of all T tokens and the last steps, which are decoded."""

    def __init__(self, problem: Problem, artifact: Artifact, variation: Variation):
        self.variation, self.spec = variation, problem.spec
        self.key, self.value = problem.key.float(), problem.value.float()
        heads, total, dims = self.key.shape[1:]
        self.prefix = problem.prefix
        self.query = problem.query.float().unflatten(1, (heads, -1))
        self.tables = Codewords.load(artifact, problem.layer, dims).on(torch.device("cpu"))
        self.words = nearest(self.tables, self.key, self.value)
        self.maps = [
            artifact.tensor("codebook", problem.layer, f"code.{name}_map").double().mT for name in ("query", "key")
        ]
        position, last = torch.arange(total), torch.arange(self.prefix, total).unsqueeze(1)
        self.choosers = self.query.shape[2] if variation.select == "head" else 1
        """Of a KV head: its G query heads where each chooses for itself, else 1."""
        keep = variation.keep(dims, self.prefix) / self.choosers
        self.count = torch.tensor([math.ceil(keep * (at + 1) - 1e-9) for at in last.flatten().tolist()])
        """[steps]: tokens read by each that chooses."""
        self.held = position <= last
        self.always = self.held & ((position < SINKS) | (position > last - RECENT))
        self.full = (position // PAGE + 1) * PAGE - 1 <= last
        """[steps, T]: whether a token's page is full."""

    def measured(self, share: float | None) -> tuple[Tensor, float]:
        """([B] errors, tokens read at a step).

        Args:
            share: of the mass, where not a number of tokens is read.
        """
        chosen, estimates = self._chosen(share), self.estimates
        true = self._logits(self.query @ self.key.unsqueeze(2).mT)
        dense = true.softmax(-1) @ self.value.unsqueeze(2)
        if self.variation.noise:
            squares = (true - estimates).where(self.held, 0.0).square().sum(-1, keepdim=True)
            estimates = estimates + self.variation.noise / 2 * squares / self.held.sum(-1, keepdim=True)
        if self.variation.base == "nothing":
            estimates = torch.full_like(estimates, -torch.inf)
        key, value = self._rows()
        exact = self._logits(self.query @ key.unsqueeze(2).mT)
        weights = torch.where(chosen, exact, estimates).softmax(-1)
        out = (weights * chosen) @ value.unsqueeze(2) + self.stand_ins(weights * ~chosen)
        return relative_error(out, dense).mean((1, 2, 3)), self.choosers * float(chosen.sum(-1).float().mean())

    @cached_property
    def estimates(self) -> Tensor:
        """Logits by codeword and code."""
        left = self.key - self._codeword("key")
        dots = self.query @ self._codeword("key").unsqueeze(2).mT
        at = 0
        for share, bits in self.variation.codes:
            dims = round(share * self.key.shape[-1])
            maps = [each[..., at : at + dims] for each in self.maps]
            if self.variation.rotated:
                maps = [each @ rotation(dims).mT for each in maps]
            query_map, key_map = (each.bfloat16().float() for each in maps)
            coded = decode(*encode(left @ key_map, bits), bits)
            dots = dots + (self.query @ query_map.unsqueeze(1)) @ coded.unsqueeze(2).mT
            at += dims
        return self._logits(dots)

    def _logits(self, dots: Tensor) -> Tensor:
        return self.spec.logits(dots).masked_fill(~self.held, -torch.inf)

    def _codeword(self, name: str) -> Tensor:
        """[B, Hkv, T, D]: "key" or "value" of each token's codeword."""
        found: Tensor = self.tables[name][self.tables["head"], self.words]
        return found

    def _rows(self) -> tuple[Tensor, Tensor]:
        """Keys and values as they are kept."""
        if self.variation.rows == 16:
            return self.key, self.value
        bits, kept = self.variation.rows, []
        for name, row in (("key", self.key), ("value", self.value)):
            matrix = rotation(row.shape[-1]).float()
            if self.variation.rounded:
                matrix = matrix.bfloat16().float()
            code = encode((row - self._codeword(name)) @ matrix.mT, bits)
            kept.append(decode(*code, bits) @ matrix + self._codeword(name))
        return kept[0], kept[1]

    @cached_property
    def order(self) -> Tensor:
        """[B, Hkv, G or 1, steps, T]: tokens in the order in which they are read, those first that always are."""
        candidates = self.estimates.masked_fill(self.always, -torch.inf)
        scores = shared(candidates, self.variation.select)
        return scores.masked_fill(self.always, torch.inf).argsort(-1, descending=True)

    def first_of(self, share: float) -> Tensor:
        """[B, Hkv, 1, steps, T] bool, in that order: those that are always read, and the fewest that hold, with these,
        a share of the estimated mass."""
        always = torch.arange(self.order.shape[-1]) < self.always.sum(-1, keepdim=True)
        return (self._mass_before < share) | always

    @cached_property
    def _mass_before(self) -> Tensor:
        """[B, Hkv, 1, steps, T]: the mass of all tokens before each in that order, mean of a KV head's queries."""
        mass = self.estimates.softmax(-1).mean(2, keepdim=True).gather(-1, self.order)
        return mass.cumsum(-1) - mass

    def _chosen(self, share: float | None) -> Tensor:
        if share is None:
            first = torch.arange(self.order.shape[-1]) < self.count.unsqueeze(-1)
        else:
            first = self.first_of(share)
        return torch.zeros_like(self.order, dtype=torch.bool).scatter(-1, self.order, first.expand_as(self.order))

    def stand_ins(self, weights: Tensor) -> Tensor:
        """[B, Hkv, G, steps, Dv] of the weights of what is not read. In a page that is not full the codeword stands for
        a token, also where the base is the page's mean."""
        base = self._means() if self.variation.own_means else self._codeword("value")
        out = weights @ base.unsqueeze(2)
        if not self.variation.pages:
            return out
        whole = self.value.shape[2] // PAGE * PAGE
        value, base = (each[:, :, :whole].unflatten(2, (-1, PAGE)) for each in (self._rows()[1], base))
        mean_of = value.mean(3, keepdim=True)
        correction = mean_of - (base if self.variation.base == "page" else base.mean(3, keepdim=True))
        return out + (weights * self.full)[..., :whole] @ correction.expand_as(value).flatten(2, 3).unsqueeze(2)

    def _means(self) -> Tensor:
        """[B, Hkv, T, Dv]: the mean value of each token's codeword in the prefix, see `Variation.base`; the codebook's
        where the prefix has no token of it."""
        weight = CALIBRATED_WEIGHT if self.variation.base == "between" else 0
        words, value = self.words[:, :, : self.prefix], self.value[:, :, : self.prefix]
        known = self.tables["value"].expand(value.shape[0], -1, -1, -1)
        counts = value.new_zeros(known.shape[:3]).scatter_add(2, words, torch.ones_like(words, dtype=value.dtype))
        sums = torch.zeros_like(known).scatter_add(2, words.unsqueeze(-1).expand_as(value), value)
        counts = counts.unsqueeze(-1)
        means = torch.where(counts > 0, (sums + weight * known) / (counts + weight), known)
        index = self.words.unsqueeze(-1).expand_as(self.value)
        return means.gather(2, index)


def mass_share(layers: Sequence[Layer]) -> float:
    """The share of the mass with which no more tokens are read in all than by number, found by bisection."""
    wanted = float(layers[0].count.float().mean())
    low, high = 0.0, 1.0
    for _ in range(20):
        share = (low + high) / 2
        read = sum(float(layer.first_of(share).sum(-1).float().mean()) for layer in layers) / len(layers)
        low, high = (share, high) if read <= wanted else (low, share)
    return low
