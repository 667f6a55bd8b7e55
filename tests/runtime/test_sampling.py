"""Samples follow the distribution that transformers' own processors leave."""

import pytest
import torch
from scipy import stats
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from kvcal.artifacts import KvcalError
from kvcal.runtime import Sampler

LOGITS = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -3.0], [0.0, 0.1, 0.2, 0.3, 0.4, 5.0]])


def test_greedy():
    assert Sampler()(LOGITS).tolist() == [0, 5]


@pytest.mark.parametrize(
    ("top_k", "top_p", "temperature"),
    [(None, None, 1.0), (3, None, 0.7), (None, 0.8, 1.5), (4, 0.9, 1.0), (9, 1.0, 2.0)],
)
def test_distribution(top_k, top_p, temperature):
    """Chi-squared over 40,000 draws of each row; the seed is fixed, by chance 1 seed in 1000 fails."""
    wanted = TemperatureLogitsWarper(temperature)(None, LOGITS)
    wanted = TopKLogitsWarper(top_k)(None, wanted) if top_k else wanted
    wanted = TopPLogitsWarper(top_p)(None, wanted) if top_p else wanted
    wanted = wanted.double().softmax(-1)
    sampler = Sampler(temperature=temperature, top_k=top_k, top_p=top_p)
    drawn = sampler(LOGITS.repeat(40000, 1), torch.Generator().manual_seed(0)).view(-1, 2)
    for row in range(2):
        there = wanted[row] > 0
        counts = torch.bincount(drawn[:, row], minlength=6).double()
        assert counts[~there].sum() == 0
        if there.sum() > 1:
            assert stats.chisquare(counts[there], wanted[row][there] * 40000).pvalue > 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 3}, "top_k and top_p are for sampling"),
        ({"temperature": 0}, "temperature 0: give a number"),
        ({"temperature": 1.0, "top_p": 0}, "top_p 0: give a probability"),
        ({"temperature": 1.0, "top_k": 0}, "top_k 0: give a whole number of at least 1"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(KvcalError, match=message):
        Sampler(**settings)
