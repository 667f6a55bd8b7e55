"""SubGen written down from its paper: one row, one KV head, one token at a time, in float64 and plain Python."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from oracle_heads import Head
from torch import Tensor

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
MEMBERS, VALUES, MERGES = range(3)


def splitmix(word: int) -> int:
    """The finaliser of splitmix64, of Vigna's public C code."""
    word &= _WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)


def draw(seed: int, stream: int, position: int, head: int, slot: int) -> float:
    word = splitmix(seed + _GOLDEN * (stream + 1))
    for coordinate in (position, head, slot):
        word = splitmix(word + _GOLDEN * (coordinate + 1))
    return (word >> 12) / 2**52


@dataclass
class Cluster:
    representative: Tensor
    count: int
    sample: list[Tensor]


@dataclass
class HeadSketch:
    """algorithm 1 of Zandieh et al. (2024), and clusters that merge when there are too many."""

    clusters: int
    growth: float
    t: int
    s: int
    seed: int
    head: int
    delta: float
    normaliser: str = "clusters"
    opened: list[Cluster] = field(default_factory=list)
    mass: float = 0.0
    kept: list[tuple[Tensor, Tensor] | None] = field(default_factory=list)
    """(key, value) of each of the s slots."""

    def __post_init__(self) -> None:
        self.kept = [None] * self.s

    def add(self, key: Tensor, value: Tensor, position: int) -> None:
        distance = [float((key - cluster.representative).norm()) for cluster in self.opened]
        if distance and min(distance) <= self.delta:
            cluster = self.opened[distance.index(min(distance))]
            cluster.count += 1
        else:
            cluster = Cluster(key, 1, [key] * self.t)
            self.opened.append(cluster)
        for slot in range(self.t):
            if draw(self.seed, MEMBERS, position, self.head, slot) < 1 / cluster.count:
                cluster.sample[slot] = key
        rounds = 0
        while len(self.opened) > self.clusters:
            self._merge(position, rounds)
            rounds += 1
        weight = float(value @ value)
        self.mass += weight
        for slot in range(self.s):
            if weight and draw(self.seed, VALUES, position, self.head, slot) < weight / self.mass:
                self.kept[slot] = (key, value)

    def _merge(self, position: int, rounds: int) -> None:
        pairs = [
            float((one.representative - other.representative).norm())
            for at, one in enumerate(self.opened)
            for other in self.opened[:at]
        ]
        self.delta = self.delta * self.growth if self.delta else min(pairs)
        stay: list[Cluster] = []
        for number, cluster in enumerate(self.opened):
            distance = [float((cluster.representative - other.representative).norm()) for other in stay]
            if not distance or min(distance) > self.delta:
                stay.append(cluster)
                continue
            into = stay[distance.index(min(distance))]
            into.count += cluster.count
            for slot in range(self.t):
                chance = draw(self.seed, MERGES + rounds, position, self.head, number * self.t + slot)
                if chance < cluster.count / into.count:
                    into.sample[slot] = cluster.sample[slot]
        self.opened = stay

    def estimate(self, head: Head) -> tuple[Tensor, float]:
        """(numerator [Dv], normaliser) for the query of `head`, the softmax scale in the exponent."""
        numerator = torch.zeros(head.value.shape[1], dtype=torch.float64)
        for slot in self.kept:
            if slot is not None:
                key, value = slot
                numerator += self.mass / (self.s * float(value @ value)) * self._weight(head, key) * value
        if self.normaliser == "values":
            pairs = [slot for slot in self.kept if slot is not None]
            return numerator, sum(
                self.mass / (self.s * float(value @ value)) * self._weight(head, key) for key, value in pairs
            )
        normaliser = sum(
            cluster.count / self.t * sum(self._weight(head, key) for key in cluster.sample) for cluster in self.opened
        )
        return numerator, normaliser

    @staticmethod
    def _weight(head: Head, key: Tensor) -> float:
        return math.exp(float(head.logit(key @ head.query)))


def attend(head: Head, exact: Sequence[int], sketch: HeadSketch) -> Tensor:
    """[Dv]: exact tokens at these positions and the sketch, under one normaliser; the model's sink has no value."""
    numerator, normaliser = sketch.estimate(head)
    for position in exact:
        weight = math.exp(float(head.logit(head.key[position] @ head.query)))
        numerator, normaliser = numerator + weight * head.value[position], normaliser + weight
    if head.spec.sink_logits is not None:
        normaliser += math.exp(float(head.spec.sink_logits[head.index]))
    return numerator / normaliser
