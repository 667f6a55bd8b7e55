"""Codes of a group of layers: against scikit-learn, numpy, and all other ways to share bits."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LinearRegression

from kvcal.calibrate.cla.group_fit import LOST, Rows, fit_group, predict, share_bits
from kvcal.kernels.codes import decode, encode
from kvcal.runtime.cla.group_code import BITS, code_bytes

HEADS, COUNT, DIM = 2, 600, 16


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def weights(seed: int = 5) -> torch.Tensor:
    drawn = torch.rand(COUNT, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) ** 4
    return drawn / drawn.sum()


def layer(seed: int = 0, falls: float = 0.7) -> Rows:
    spread = falls ** torch.arange(DIM, dtype=torch.float64)
    turn = torch.linalg.qr(random(HEADS, DIM, DIM, seed=seed + 1)).Q
    rows = random(HEADS, COUNT, DIM, seed=seed) * spread @ turn + random(HEADS, 1, DIM, seed=seed + 2)
    return Rows(rows, torch.eye(DIM, dtype=torch.float64).expand(HEADS, -1, -1))


def test_what_bits_lose_of_a_normal_distribution() -> None:
    """`LOST` is what `encode` loses of normal vectors of a usual number of coefficients, where the decoder shrinks."""
    normal = random(4000, 48)
    for bits in BITS:
        found = decode(*encode(normal, bits), bits).double()
        shrunk = float((normal * found).sum() / found.square().sum())
        lost = float((normal - shrunk * found).square().mean())
        assert lost == pytest.approx(LOST[bits], rel=0.25), bits
    assert LOST[0] == 1


def test_earlier_layers_predict_as_weighted_least_squares() -> None:
    told, rows, weight = random(HEADS, COUNT, 6), random(HEADS, COUNT, DIM, seed=1), weights()
    rows = rows + told @ random(HEADS, 6, DIM, seed=2)
    maps = predict(told, rows, weight)
    for head in range(HEADS):
        oracle = LinearRegression().fit(told[head].numpy(), rows[head].numpy(), weight.numpy())
        np.testing.assert_allclose(maps[head].numpy(), oracle.coef_.T, rtol=2e-3, atol=2e-3)  # the ridge


def test_a_layer_by_itself_has_its_principal_components() -> None:
    """Where all tokens and all directions count alike, coefficients span what scikit-learn's PCA finds."""
    of = layer()
    fit = fit_group([of], torch.full((COUNT,), 1 / COUNT, dtype=torch.float64), level=0.02)[0]
    kept = sum(fit.code.counts)
    assert 0 < kept < DIM
    for head in range(HEADS):
        oracle = PCA(kept).fit(of.rows[head].numpy())
        found = np.linalg.qr(fit.code.basis[head].double().numpy())[0]
        cosines = np.linalg.svd(oracle.components_ @ found)[1]
        np.testing.assert_allclose(cosines, 1, atol=1e-4)


def test_the_metric_says_what_an_error_costs() -> None:
    """Directions that no query has get no coefficient."""
    of = layer(falls=1.0)
    blind = torch.diag(torch.tensor([1.0] * 8 + [0.0] * 8, dtype=torch.float64))
    fit = fit_group([Rows(of.rows, blind.expand(HEADS, -1, -1))], weights(), level=1e-4)[0]
    assert sum(fit.code.counts) == 8 and fit.lost < 0.01
    seen = fit.code.basis[:, :8].square().sum() / fit.code.basis.square().sum()
    assert seen > 0.999


@pytest.mark.parametrize("level", [1e-5, 1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("falls", [0.5, 0.8, 0.95])
def test_no_other_share_of_the_bits_loses_less(level: float, falls: float) -> None:
    """Of all ways to give 8, 4 and 2 bits to coefficients in steps of 8, none of as few bits loses less, but for the
    rounding to these steps."""
    dims = 64
    spectrum = falls ** torch.arange(dims, dtype=torch.float64)

    def lost(counts: tuple[int, ...]) -> float:
        bits = [bits for count, bits in zip(counts, BITS, strict=True) for _ in range(count)]
        shares = [LOST[bits[at]] if at < len(bits) else LOST[0] for at in range(dims)]
        return float(spectrum @ torch.tensor(shares, dtype=torch.float64))

    def size(counts: tuple[int, ...]) -> int:
        return sum(count * bits for count, bits in zip(counts, BITS, strict=True))

    found = share_bits(spectrum, level)
    steps = range(0, dims + 1, 8)
    others = (counts for counts in itertools.product(steps, repeat=3) if 0 < sum(counts) <= dims)
    best = min(lost(counts) for counts in others if size(counts) <= size(found))
    assert lost(found) <= 1.35 * best + 8 * level < 0.3 * float(spectrum.sum())


def test_bits_are_multiples_that_bytes_hold() -> None:
    for dims, step in ((64, 8), (4, 4), (20, 4), (18, 4)):
        for level in (0.0, 1e-3, 1e9):
            counts = share_bits(torch.linspace(1, 0.1, dims).double(), level)
            assert all(count % step == 0 for count in counts) and step <= sum(counts) <= dims
    assert share_bits(torch.ones(64).double(), 0.0) == (64, 0, 0) and share_bits(torch.ones(64).double(), 9.0) == (
        0,
        0,
        8,
    )


def test_bytes_of_a_token() -> None:
    assert (
        code_bytes((8, 16, 32)) == 8 + 8 + 8 + 3 * 2 and code_bytes((0, 0, 8)) == 2 + 2 and code_bytes((0, 64, 0)) == 34
    )


def test_an_equal_layer_is_told_by_the_one_before() -> None:
    first = layer()
    turned = Rows(first.rows @ random(HEADS, DIM, DIM, seed=9), first.metric)
    one, other = fit_group([first, turned], weights(), level=1e-5)
    alone = fit_group([turned], weights(), level=1e-5)[0]
    assert one.told == 0 and other.told > 0.99 and alone.told == 0
    assert code_bytes(other.code.counts) < code_bytes(alone.code.counts) and other.lost < 0.02
    assert other.code.back.shape == (HEADS, sum(one.code.counts) + sum(other.code.counts), DIM)


def test_what_earlier_codes_have_lost_is_made_up_for() -> None:
    """The second layer's code is of what the first's coefficients, as they come back, do not tell."""
    first = layer()
    coarse = fit_group([first], weights(), level=1e9)[0]  # eight coefficients of 2 bits
    one, other = fit_group([first, first], weights(), level=1e9)
    assert torch.equal(one.coefficients, coarse.coefficients)
    assert other.lost < 0.5 * one.lost


def test_what_is_lost_is_that_of_the_restored_rows() -> None:
    of, weight = layer(), weights()
    fit = fit_group([of], weight, level=0.05)[0]
    restored = fit.code.offset.double().unsqueeze(1) + fit.coefficients @ fit.code.back.double()
    for_head = []
    for head in range(HEADS):
        rows, mean = of.rows[head].numpy(), np.average(of.rows[head].numpy(), axis=0, weights=weight.numpy())
        errors = np.average(((restored[head].numpy() - rows) ** 2).sum(1), weights=weight.numpy())
        for_head.append(errors / np.average(((rows - mean) ** 2).sum(1), weights=weight.numpy()))
    assert fit.lost == pytest.approx(np.mean(for_head), rel=1e-4)
