"""Greedy allocation along convex hulls against the Lagrangian's minimum, by brute force."""

from __future__ import annotations

import itertools
import random

import pytest

from kvcal.calibrate.planning.allocate import Choice, choices, hull, within
from kvcal.calibrate.planning.points import DENSE, Point


def random_points(rng: random.Random, count: int) -> list[Point]:
    return [
        Point({"method": "spectral", "keep": number + 1}, rng.random(), rng.random(), rng.random(), ())
        for number in range(count)
    ] + [DENSE]


@pytest.mark.parametrize("seed", range(5))
def test_hull_is_the_lower_convex_hull(seed):
    """Every point lies on or above the line through neighbours of the hull, and hull points are points."""
    points = random_points(random.Random(seed), 40)
    found = hull(points)
    assert all(point in points for point in found)
    assert found[0].bytes == min(point.bytes for point in points) and found[-1] == DENSE
    for before, after in itertools.pairwise(found):
        assert before.bytes < after.bytes and before.loss > after.loss
        slope = (after.loss - before.loss) / (after.bytes - before.bytes)
        for point in points:
            assert point.loss >= before.loss + slope * (point.bytes - before.bytes) - 1e-12


def test_of_equal_bytes_the_better_one_stays():
    worse, better = (Point({"method": "loki", "keep": keep}, 0.1, 0.2, loss, ()) for keep, loss in ((1, 0.5), (2, 0.3)))
    assert hull([worse, better, DENSE]) == [better, DENSE]


@pytest.mark.parametrize("seed", range(5))
def test_allocations_minimise_the_lagrangian(seed):
    """min Σ loss + λ Σ bytes over every combination, for multipliers between the slopes of all edges."""
    rng = random.Random(seed)
    points = {layer: random_points(rng, 6) for layer in (0, 2, 3)}
    found = choices(points)
    slopes = sorted(
        {
            (before.loss - after.loss) / (after.bytes - before.bytes)
            for of_layer in points.values()
            for before, after in itertools.pairwise(hull(of_layer))
        },
        reverse=True,
    )
    between = [2 * slopes[0], *[(a + b) / 2 for a, b in itertools.pairwise(slopes)], slopes[-1] / 2]
    assert len(between) == len(found)
    for multiplier, choice in zip(between, found, strict=True):
        best = min(
            sum(point.loss + multiplier * point.bytes for point in combination)
            for combination in itertools.product(*points.values())
        )
        reached = choice.loss + multiplier * sum(point.bytes for point in choice.points.values())
        assert reached == pytest.approx(best, abs=1e-12)


def test_more_bytes_take_nothing_away():
    rng = random.Random(7)
    found = choices({layer: random_points(rng, 20) for layer in range(4)})
    for poorer, richer in itertools.pairwise(found):
        assert all(richer.points[layer].bytes >= point.bytes for layer, point in poorer.points.items())
        assert richer.bytes > poorer.bytes and richer.loss < poorer.loss


def test_the_order_of_points_does_not_matter():
    rng = random.Random(3)
    points = {layer: random_points(rng, 20) for layer in range(3)}
    shuffled = {layer: rng.sample(of_layer, len(of_layer)) for layer, of_layer in points.items()}
    assert choices(points) == choices(shuffled)


def test_within_spends_no_more_than_the_budget():
    rng = random.Random(1)
    found = choices({layer: random_points(rng, 20) for layer in range(3)})
    for budget in (0.2, 0.5, 0.9, 1.0):
        choice = within(found, budget)
        dearer = [other for other in found if other.bytes <= budget]
        assert choice == (dearer[-1] if dearer else None)
    assert within(found, found[0].bytes * 0.99) is None
    assert within(found, 1.0) == Choice(dict.fromkeys(range(3), DENSE))
