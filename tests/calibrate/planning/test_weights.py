"""Weights of layers: divergence over loss, as far as it is more than noise."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from kvcal.calibrate.planning.weights import weights

LOSSES = {0: 0.1, 2: 0.2, 3: 0.1}


def test_without_noise_they_are_the_quotients():
    by_row = {0: [0.01, 0.01], 2: [0.01, 0.01], 3: [0.04, 0.04]}
    found = weights({layer: rows[0] for layer, rows in by_row.items()}, LOSSES, by_row)
    assert found == pytest.approx({0: 0.1, 2: 0.05, 3: 0.4})


def test_of_one_row_all_are_alike():
    found = weights({0: 0.01, 2: 0.01, 3: 0.04}, LOSSES, {0: [0.01], 2: [0.01], 3: [0.04]})
    alike = (0.1 * 0.05 * 0.4) ** (1 / 3)
    assert found == pytest.approx(dict.fromkeys(LOSSES, alike))


def test_shrinking_brings_them_nearer_to_the_truth():
    """Of 400 layers with known weights and noisy rows, errors of logarithms are about those of the best linear guess:
    the variance of the truth times the share that is noise."""
    draw = torch.Generator().manual_seed(0)
    truth = 0.5 * torch.randn(400, generator=draw)
    rows = (truth.exp().unsqueeze(1) * (1 + 0.8 * torch.randn(400, 4, generator=draw)).clamp_min(0.05)).double()
    by_row = {layer: row.tolist() for layer, row in enumerate(rows)}
    moved = {layer: statistics.fmean(row) for layer, row in by_row.items()}
    found = weights(moved, dict.fromkeys(by_row, 1.0), by_row)

    def error(of):
        logarithms = torch.tensor([math.log(each) for each in of.values()])
        return float(((logarithms - logarithms.mean()) - (truth - truth.mean())).square().mean())

    noise = error(moved)
    assert error(found) < 0.8 * noise
    assert error(found) == pytest.approx(0.25 * noise / (0.25 + noise), rel=0.25)


def test_a_layer_that_moves_nothing_has_a_weight():
    found = weights({0: 0.0, 2: 0.01}, {0: 0.0, 2: 0.1}, {0: [0.0, 0.0], 2: [0.01, 0.01]})
    assert all(math.isfinite(each) and each > 0 for each in found.values())
