"""How a budget of bytes is dealt to the layers: greedily along the convex hulls of what each layer offers.

Minimising the sum of losses under a sum of bytes, with a multiplier λ on the bytes, chooses in every layer the point
where its lower convex hull has slope −λ. Going through the hulls' edges in order of falling gain per byte passes all
those choices (Shoham & Gersho 1988): the budget buys the edges that it can pay for, in this order. So a larger budget
never takes anything away from a layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .points import Point


@dataclass(frozen=True)
class Choice:
    """A point for every layer."""

    points: Mapping[int, Point]

    @property
    def bytes(self) -> float:
        """Read, over what dense attention reads in all these layers (the same in each)."""
        return sum(point.bytes for point in self.points.values()) / len(self.points)

    @property
    def error(self) -> float:
        """Mean over layers."""
        return sum(point.error for point in self.points.values()) / len(self.points)

    @property
    def loss(self) -> float:
        return sum(point.loss for point in self.points.values())


def hull(points: Sequence[Point]) -> list[Point]:
    """The lower convex hull of loss over bytes, from the cheapest point on, each next one dearer and better."""
    ordered = sorted(points, key=lambda point: (point.bytes, point.loss, repr(sorted(point.setting.items()))))
    kept: list[Point] = []
    for point in ordered:
        if kept and point.loss >= kept[-1].loss:
            continue
        while len(kept) > 1 and _gain(kept[-2], kept[-1]) <= _gain(kept[-2], point):
            kept.pop()
        kept.append(point)
    return kept


def choices(points: Mapping[int, Sequence[Point]]) -> list[Choice]:
    """All allocations on the way from the cheapest point everywhere to the best one everywhere, by rising bytes.

    Args:
        points: of each layer, at least one.
    """
    hulls = {layer: hull(of_layer) for layer, of_layer in points.items()}
    edges = [
        (-_gain(before, after), layer, step)
        for layer, of_layer in hulls.items()
        for step, (before, after) in enumerate(itertools.pairwise(of_layer))
    ]
    chosen = {layer: of_layer[0] for layer, of_layer in hulls.items()}
    found = [Choice(dict(chosen))]
    for _, layer, step in sorted(edges):  # within a layer, gains fall: its edges come in their order
        chosen[layer] = hulls[layer][step + 1]
        found.append(Choice(dict(chosen)))
    return found


def within(found: Sequence[Choice], budget: float) -> Choice | None:
    """The last of `choices` that reads at most `budget` of dense attention's bytes; None: not even the first."""
    return next((choice for choice in reversed(found) if choice.bytes <= budget), None)


def _gain(before: Point, after: Point) -> float:
    """Loss saved per byte."""
    return (before.loss - after.loss) / max(after.bytes - before.bytes, 1e-12)
