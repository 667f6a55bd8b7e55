"""Alignment and its R² against scikit-learn's ridge, and in cases whose answer is known."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from kvcal.calibrate.cla.likeness import _RIDGES, Source


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def flat(rows):
    return rows.transpose(0, 1).flatten(1).double().numpy()


def oracle(source, target):
    """Held-out predictions, per half with the ridge of least generalised cross-validation score, by its hat matrix."""
    x, y = flat(source), flat(target)
    half = len(x) // 2
    predicted = np.empty_like(y)
    for fit, rest in ((slice(0, half), slice(half, None)), (slice(half, None), slice(0, half))):
        centred = x[fit] - x[fit].mean(0)
        squares = np.linalg.svd(centred, compute_uv=False) ** 2
        squares = squares[squares > 1e-12 * squares.max()]
        candidates = []
        for ridge in _RIDGES:
            model = Ridge(ridge * squares.mean(), solver="svd").fit(x[fit], y[fit])
            hat = centred @ np.linalg.solve(centred.T @ centred + model.alpha * np.eye(centred.shape[1]), centred.T)
            freedom = len(centred) - 1 - np.trace(hat)
            if freedom > 0:
                candidates.append((((y[fit] - model.predict(x[fit])) ** 2).sum() / freedom**2, model))
        predicted[rest] = min(candidates, key=lambda candidate: candidate[0])[1].predict(x[rest])
    return predicted, 1 - ((y - predicted) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()


@pytest.mark.parametrize("tokens", [30, 101, 400])
@pytest.mark.parametrize("noise", [0.1, 3.0])
def test_against_scikit_learn(tokens, noise):
    """Sixteen dimensions from sixteen: fewer, about as many, and many more tokens than that."""
    source = draw(2, tokens, 8)
    target = (source.transpose(0, 1).flatten(1) @ draw(16, 12, seed=1) + 5).unflatten(1, (3, 4)).transpose(0, 1)
    target = target + noise * draw(3, tokens, 4, seed=2)
    found = Source(source).predict(target)
    predicted, r2 = oracle(source, target)
    assert found.r2 == pytest.approx(r2, abs=1e-6)
    assert found.predicted.shape == target.shape
    np.testing.assert_allclose(flat(found.predicted), predicted, rtol=1e-3, atol=1e-3)


def test_a_linear_map_between_all_heads_is_found():
    source = draw(2, 200, 6)
    target = (source.transpose(0, 1).flatten(1) @ draw(12, 12, seed=1)).unflatten(1, (2, 6)).transpose(0, 1) - 3
    found = Source(source).predict(target)
    assert found.r2 == pytest.approx(1, abs=1e-9) and found.r2_unaligned < 0.5
    torch.testing.assert_close(found.predicted, target, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dims", [4, 40, 400])
def test_many_dimensions_do_not_flatter(dims):
    """Nothing to be learned: with 40 dimensions for 50 tokens plain least squares would explain 80 % of what it saw."""
    found = Source(draw(1, 100, dims)).predict(draw(1, 100, dims, seed=1))
    assert -0.2 < found.r2 < 0.05


def test_signal_and_noise_share_the_variance():
    """Target = source + as much noise: half of its variance is the source's, and no map explains more."""
    source = draw(1, 4000, 3)
    found = Source(source).predict(source + draw(1, 4000, 3, seed=1))
    assert found.r2 == pytest.approx(0.5, abs=0.03)
    assert found.r2_unaligned == pytest.approx(0.5, abs=0.03)


def test_unaligned():
    source = draw(1, 50, 3).double()
    shifted = source + torch.tensor([1.0, 0.0, 0.0])
    spread = float((source - source.mean(1, keepdim=True)).square().sum())
    assert Source(source).predict(shifted).r2_unaligned == pytest.approx(1 - 50 / spread)
    assert Source(source).predict(source).r2_unaligned == 1


def test_constant_rows():
    constant = torch.ones(1, 20, 2)
    assert Source(constant).predict(constant).r2 == 1
    assert Source(constant).predict(draw(1, 20, 2)).r2 < 0.1
    assert Source(draw(1, 20, 2)).predict(constant).r2 == pytest.approx(1)
