"""Samples too small for their head dim are told, by a rule that random matrices obey."""

from __future__ import annotations

import dataclasses
import math
import warnings

import numpy as np
import pytest
from samples import artifact as sample

from kvcal.calibrate.sample_size import ERROR, TOKENS_PER_DIMENSION, SmallSampleWarning, small_sample, warn_if_small


def with_tokens(tokens: int, head_dim: int):
    made = sample(layers=1, head_dim=head_dim)
    return dataclasses.replace(made, data={**made.data, "tokens_counted": tokens})


def test_ranks_of_independent_tokens_err_as_the_half_circle_says() -> None:
    """White noise, whose true rank@90 is 0.9 D: the relative error is 0.18 √(D/n)."""
    dim, rng = 128, np.random.default_rng(0)
    for per_dimension in (TOKENS_PER_DIMENSION, 8 * TOKENS_PER_DIMENSION):
        tokens = rng.standard_normal((per_dimension * dim, dim))
        shares = np.sort(np.linalg.eigvalsh(tokens.T @ tokens))[::-1]
        rank = np.interp(0.9, np.cumsum(shares) / shares.sum(), np.arange(1, dim + 1))
        spread = math.sqrt(1 / per_dimension)  # errors of higher order are smaller by this
        assert 1 - rank / (0.9 * dim) == pytest.approx(0.18 * spread, rel=1.5 * spread)


def test_text_counts_for_less_than_independent_tokens() -> None:
    """The constant is what SmolLM2 showed (docs/results/real.md), and no less than the half circle's."""
    measured = {128: 40.66, 8192: 41.51}
    assert 1 - measured[TOKENS_PER_DIMENSION] / measured[8192] == pytest.approx(ERROR, abs=0.001)
    assert 0.18 / math.sqrt(TOKENS_PER_DIMENSION) < ERROR


@pytest.mark.parametrize("head_dim", [8, 64])
def test_where_it_begins(head_dim: int) -> None:
    enough = 128 * head_dim
    assert small_sample(with_tokens(enough, head_dim)) is None
    message = small_sample(with_tokens(enough - 1, head_dim))
    assert message is not None and f"few for a head dim of {head_dim}: ranks come out about 2 % too small" in message
    quarter = small_sample(with_tokens(enough // 4, head_dim))
    assert quarter is not None and "about 4 % too small" in quarter
    assert "span no basis" in str(small_sample(with_tokens(head_dim, head_dim)))


def test_4088_tokens_of_a_model_with_64_dimensions() -> None:
    assert "give at least 9k (--num-tokens, --data)" in str(small_sample(with_tokens(4088, 64)))


def test_the_api_warns() -> None:
    with pytest.warns(SmallSampleWarning, match="4088 tokens are few"):
        warn_if_small(with_tokens(4088, 64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_small(with_tokens(131072, 64))
