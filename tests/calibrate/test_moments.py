from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcal.calibrate.moments import MomentsFitter


def samples(seed, tokens=97, heads=3, dim=5, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(heads, dim, dim, generator=generator, dtype=torch.float64)
    return torch.randn(heads, tokens, dim, generator=generator, dtype=torch.float64) @ mix + offset


def fitted(parts):
    fitter = MomentsFitter(parts[0].shape[0], parts[0].shape[-1])
    for part in parts:
        fitter.update(part)
    return fitter


def assert_moments_of(moments, data):
    assert moments.count == data.shape[1]
    torch.testing.assert_close(moments.mean, data.mean(1), rtol=1e-12, atol=1e-12)
    for head in range(data.shape[0]):
        expected = torch.cov(data[head].T, correction=0)
        torch.testing.assert_close(moments.covariance[head], expected, rtol=1e-10, atol=1e-12 * expected.abs().max())


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), cuts=st.lists(st.integers(0, 97), max_size=6), reverse=st.booleans())
def test_streaming_equals_batch_for_any_batch_sizes_and_orders(seed, cuts, reverse):
    data = samples(seed)
    bounds = [0, *sorted(cuts), data.shape[1]]
    parts = [data[:, a:b] for a, b in pairwise(bounds)]  # some are empty
    moments = fitted(parts[::-1] if reverse else parts).finalize()
    assert_moments_of(moments, data)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), cut=st.integers(0, 97))
def test_merged_halves_equal_the_whole(seed, cut):
    data = samples(seed)
    first, second = fitted([data[:, :cut]]), fitted([data[:, cut:]])
    first.merge(second)
    assert_moments_of(first.finalize(), data)


def test_a_mean_a_million_times_the_spread_costs_no_digits():
    """Key biases make such keys; E[x xᵀ] - mean meanᵀ would keep four digits here."""
    spread = samples(0, tokens=400)
    moments = fitted((spread + 1e6).split(37, 1)).finalize()
    for head in range(3):
        expected = torch.cov(spread[head].T, correction=0)
        torch.testing.assert_close(moments.covariance[head], expected, rtol=1e-8, atol=1e-8 * expected.abs().max())


def test_second_moment_is_uncentred():
    data = samples(1, offset=3.0)
    expected = data.mT @ data / data.shape[1]
    torch.testing.assert_close(fitted([data]).finalize().second_moment, expected, rtol=1e-10, atol=1e-10)


def test_a_finalized_result_does_not_change_with_the_fitter():
    data = samples(2)
    fitter = fitted([data[:, :50]])
    moments = fitter.finalize()
    before = moments.mean.clone(), moments.covariance.clone()
    fitter.update(data[:, 50:])
    assert torch.equal(moments.mean, before[0]) and torch.equal(moments.covariance, before[1])


def test_low_precision_samples_are_accumulated_in_float64():
    data = samples(3, tokens=4000).to(torch.bfloat16)
    assert_moments_of(fitted(data.split(7, 1)).finalize(), data.double())


def test_too_few_samples_have_no_covariance():
    with pytest.raises(ValueError, match="1 samples"):
        fitted([samples(0, tokens=1)]).finalize()
