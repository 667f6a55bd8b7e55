"""The few plans at a budget that are worth decoding."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .allocate import Choice, choices, within
from .points import Point
from .settings import Setting

UNIFORM = 3
"""Uniform settings that are decoded: those of the least predicted loss, besides the one that reads most."""


@dataclass(frozen=True)
class Candidate:
    kind: str
    """"weighted", "unweighted" or "uniform"."""
    choice: Choice
    divergence: float = math.nan
    """In nats, once decoded."""

    def decoded(self, divergence: float) -> Candidate:
        return dataclasses.replace(self, divergence=divergence)

    @property
    def settings(self) -> dict[int, Setting]:
        return {layer: point.setting for layer, point in self.choice.points.items()}


def weighted(points: Mapping[int, Sequence[Point]], weights: Mapping[int, float]) -> dict[int, list[Point]]:
    """The same points, each loss multiplied by its layer's weight."""
    return {
        layer: [dataclasses.replace(point, loss=weights[layer] * point.loss) for point in found]
        for layer, found in points.items()
    }


def candidates(points: Mapping[int, Sequence[Point]], weights: Mapping[int, float], budget: float) -> list[Candidate]:
    """Allocations by weighted and by plain losses, and the best uniform settings.

    Args:
        points: of each layer, in the same order.
        budget: of dense attention's bytes.

    Returns:
        Those within the budget, none twice.
    """
    by_kind = {"weighted": weighted(points, weights), "unweighted": points}
    dealt = [(kind, within(choices(of_kind), budget)) for kind, of_kind in by_kind.items()]
    found = [Candidate(kind, choice) for kind, choice in dealt if choice is not None]
    found += [Candidate("uniform", choice) for choice in uniform(by_kind["weighted"], budget)]
    return [
        candidate
        for at, candidate in enumerate(found)
        if candidate.settings not in [earlier.settings for earlier in found[:at]]
    ]


def uniform(points: Mapping[int, Sequence[Point]], budget: float) -> list[Choice]:
    """Choices of one setting for all layers, within a budget: those of the least loss, and the one that reads most."""
    columns = zip(*points.values(), strict=True)
    all_ = [Choice(dict(zip(points, column, strict=True))) for column in columns]
    fitting = [choice for choice in all_ if choice.bytes <= budget]
    best = sorted(fitting, key=lambda choice: choice.loss)[:UNIFORM]
    return [*best, *sorted(fitting, key=lambda choice: choice.bytes)[-1:]]
