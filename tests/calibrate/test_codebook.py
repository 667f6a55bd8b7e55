"""Codebooks of keys and values together, against scikit-learn and definitions written out in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from kvcal.artifacts import KvcalError
from kvcal.calibrate.codebook import code_moments, fit_code_basis, fit_codebook, spread_of, unexplained
from kvcal.calibrate.moments import Moments
from kvcal.calibrate.score_basis import expected_score_error

HEADS, TOKENS, D, DV = 2, 240, 6, 4
SPREAD = torch.tensor([[10.0, 0.1], [2.0, 3.0]])


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pairs() -> tuple[Tensor, Tensor, np.ndarray]:
    """Keys and values in twelve groups that neither alone tells apart: four of keys times three of values."""
    truth = torch.arange(TOKENS) % 12
    keys, values = drawn(4, D, seed=1) * 4, drawn(3, DV, seed=2) * 4
    key = (keys[truth % 4] + 0.05 * drawn(HEADS, TOKENS, D, seed=3)) * SPREAD[:, :1, None]
    value = (values[truth // 4] + 0.05 * drawn(HEADS, TOKENS, DV, seed=4)) * SPREAD[:, 1:, None]
    return key, value, truth.numpy()


def nearest(key: Tensor, value: Tensor, codebook) -> Tensor:
    """[Hkv, N], by the distance that docs/format.md states."""
    of_keys, of_values = (
        (points.double().unsqueeze(2) - words.double().unsqueeze(1)).square().sum(-1)
        for points, words in ((key, codebook.key), (value, codebook.value))
    )
    a, b = codebook.spread.double().unbind(-1)
    return (of_keys / a.view(-1, 1, 1) ** 2 + of_values / b.view(-1, 1, 1) ** 2).argmin(-1)


def test_groups_of_pairs_are_found_whatever_the_scales():
    key, value, truth = pairs()
    found = fit_codebook(key, value, SPREAD, codewords=12)
    for head, words in enumerate(found.assign(key, value).numpy()):
        assert adjusted_rand_score(truth, words) == 1.0, head
    assert found.sizes.tolist() == [[20] * 12] * 2
    for words, means in ((key, found.key), (value, found.value)):
        members = torch.stack([words[0, torch.from_numpy(truth) == group].double().mean(0) for group in range(12)])
        distance = torch.cdist(members, means[0].double()).amin(1)
        assert float(distance.max()) < 1e-4 * float(members.norm(dim=-1).max())


def test_as_good_as_scikit_learn_without_groups():
    key, value = drawn(1, 600, D, seed=5) * 3, drawn(1, 600, DV, seed=6)
    spread = torch.tensor([[3.0, 1.0]])
    found = fit_codebook(key, value, spread, codewords=10)
    points = torch.cat((key[0] / 3, value[0]), -1).double().numpy()
    words = found.assign(key, value)[0]
    centers = torch.cat((found.key[0] / 3, found.value[0]), -1).double().numpy()
    inertia = float(((points - centers[words.numpy()]) ** 2).sum())
    assert inertia == pytest.approx(KMeans(10, n_init=5, random_state=0).fit(points).inertia_, rel=0.02)


def test_tokens_belong_to_the_nearest_codeword_and_sizes_count_them():
    key, value = drawn(HEADS, TOKENS, D, seed=7), drawn(HEADS, TOKENS, DV, seed=8)
    found = fit_codebook(key, value, SPREAD, codewords=9)
    words = nearest(key, value, found)
    assert torch.equal(found.assign(key, value), words)
    assert torch.equal(found.sizes, torch.stack([torch.bincount(head, minlength=9) for head in words]))
    assert bool((found.sizes[:, 1:] <= found.sizes[:, :-1]).all())


def test_sizes_count_with_the_codewords_as_they_are_kept():
    """Far from the origin the rounding of a codeword may give a token to another one."""
    key, value = drawn(1, 4000, 4, seed=20) + 300, drawn(1, 4000, 2, seed=21)
    found = fit_codebook(key, value, torch.ones(1, 2), codewords=40, iterations=3)
    assert torch.equal(found.sizes[0], torch.bincount(found.assign(key, value)[0], minlength=40))
    assert bool((found.sizes[:, 1:] <= found.sizes[:, :-1]).all())


def test_again_the_same_bytes():
    key, value, _ = pairs()
    one, two = (fit_codebook(key, value, SPREAD, codewords=7, seed=3) for _ in range(2))
    assert torch.equal(one.key, two.key) and torch.equal(one.value, two.value) and torch.equal(one.sizes, two.sizes)


def test_what_is_left_is_coded_in_the_basis_that_is_best_for_it():
    key, value = drawn(HEADS, TOKENS, D, seed=9), drawn(HEADS, TOKENS, DV, seed=10)
    mixed = drawn(HEADS, D, D, seed=11).double()
    queries = Moments(100, drawn(HEADS, D, seed=12).double(), mixed @ mixed.mT)
    found = fit_codebook(key, value, SPREAD, codewords=5)
    left = key.double() - torch.stack([found.key[head, words] for head, words in enumerate(found.assign(key, value))])
    moments = code_moments(found, key, value)
    torch.testing.assert_close(moments.mean, left.mean(1))
    torch.testing.assert_close(moments.covariance, torch.stack([torch.cov(head.T, correction=0) for head in left]))
    basis = fit_code_basis(found, queries, key, value)
    for rank in (1, 3, D):
        error = expected_score_error(queries, moments, basis.query_map[:, :rank], basis.key_map[:, :rank])
        torch.testing.assert_close(error, basis.singular_values[:, rank:].square().sum(-1), atol=1e-9, rtol=1e-6)


def test_unexplained_is_one_of_one_codeword_and_nothing_of_one_for_each_token():
    key, value = drawn(HEADS, 30, D, seed=13), drawn(HEADS, 30, DV, seed=14)
    one, all_of_them = (fit_codebook(key, value, SPREAD, codewords=count) for count in (1, 30))
    for share in unexplained(one, key, value):
        torch.testing.assert_close(share, torch.ones(HEADS, dtype=torch.float64), atol=1e-6, rtol=0)
    for share in unexplained(all_of_them, key, value):
        torch.testing.assert_close(share, torch.zeros(HEADS, dtype=torch.float64), atol=1e-9, rtol=0)
    assert all(bool((share > 1).all()) for share in unexplained(one, key + 9, value + 9)), "of text from elsewhere"


def test_spread_is_the_root_mean_variance():
    key, value = drawn(HEADS, TOKENS, D, seed=15) * 5, drawn(HEADS, TOKENS, DV, seed=16)
    covariances = [torch.stack([torch.cov(head.T.double(), correction=0) for head in of]) for of in (key, value)]
    found = spread_of(covariances[0], covariances[1] * 0)
    wanted = key.double().var(1, correction=0).mean(-1).sqrt()
    torch.testing.assert_close(found[:, 0].double(), wanted, rtol=1e-6, atol=0)
    assert found[:, 1].tolist() == [1.0, 1.0], "where nothing varies nothing is divided"


@pytest.mark.parametrize("codewords", [0, 31])
def test_codewords_that_a_sample_cannot_make(codewords):
    with pytest.raises(KvcalError, match=rf"{codewords} codewords of 30 sampled tokens \(layer 3\): ask for 1 to 30"):
        fit_codebook(drawn(1, 30, D), drawn(1, 30, DV), SPREAD[:1], codewords=codewords, where="layer 3")


def test_no_iterations():
    with pytest.raises(KvcalError, match="0 iterations: give at least 1"):
        fit_codebook(drawn(1, 30, D), drawn(1, 30, DV), SPREAD[:1], codewords=2, iterations=0)


def test_keys_that_are_no_numbers():
    key = drawn(1, 30, D)
    key[0, 4, 2] = torch.nan
    with pytest.raises(KvcalError, match="keys hold NaN or infinity, the first in KV head 0"):
        fit_codebook(key, drawn(1, 30, DV), SPREAD[:1], codewords=2)
