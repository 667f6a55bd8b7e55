"""What is decoded at a budget: allocations and uniform settings that fit it, none twice."""

from __future__ import annotations

import itertools
import random

import pytest

from kvcal.calibrate.planning.candidates import UNIFORM, candidates, uniform, weighted
from kvcal.calibrate.planning.points import DENSE, Point

WEIGHTS = {0: 3.0, 2: 0.1, 3: 1.0}


def points(seed: int, count: int = 12) -> dict[int, list[Point]]:
    """Of every layer the same settings, which read the same, in one order; dense attention last."""
    rng = random.Random(seed)
    read = [rng.random() for _ in range(count)]
    return {
        layer: [Point({"method": "spectral", "keep": at + 1}, read[at], 0.1, rng.random(), ()) for at in range(count)]
        + [DENSE]
        for layer in WEIGHTS
    }


@pytest.mark.parametrize("budget", [0.4, 0.6, 0.9])
def test_all_fit_the_budget_and_differ(budget):
    found = candidates(points(0), WEIGHTS, budget)
    assert found[0].kind == "weighted" and {each.kind for each in found} <= {"weighted", "unweighted", "uniform"}
    assert all(each.choice.bytes <= budget for each in found)
    assert all(a.settings != b.settings for a, b in itertools.combinations(found, 2))


def test_uniform_settings_are_the_best_by_weighted_loss_and_the_richest():
    of = points(1)
    fitting = [at for at, point in enumerate(of[0]) if point.bytes <= 0.7]
    loss = {at: sum(WEIGHTS[layer] * of[layer][at].loss for layer in of) for at in fitting}
    best = sorted(fitting, key=loss.__getitem__)[:UNIFORM]
    richest = max(fitting, key=lambda at: of[0][at].bytes)
    found = [choice.points[2].setting for choice in uniform(weighted(of, WEIGHTS), 0.7)]
    assert found == [of[2][at].setting for at in (*best, richest)]
    assert all(len({repr(p.setting) for p in choice.points.values()}) == 1 for choice in uniform(of, 0.7))


def test_a_weight_moves_bytes_to_its_layer():
    """Of two layers that offer the same, that which counts more reads more."""
    alike = {layer: points(2)[0] for layer in (0, 1)}
    (found, *_) = candidates(alike, {0: 100.0, 1: 0.01}, 0.5)
    assert found.kind == "weighted" and found.choice.points[0].bytes > found.choice.points[1].bytes


def test_nothing_fits():
    assert candidates(points(3), WEIGHTS, 1e-9) == []
