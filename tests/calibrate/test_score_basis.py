import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcal.calibrate.moments import MomentsFitter
from kvcal.calibrate.pca import fit_pca
from kvcal.calibrate.score_basis import expected_score_error, fit_score_basis

DIM = 8


def moments_of(data):
    fitter = MomentsFitter(data.shape[0], data.shape[-1])
    fitter.update(data)
    return fitter.finalize()


def draw(seed, rank_deficient=False, tokens=300):
    generator = torch.Generator().manual_seed(seed)
    mixes = torch.randn(2, 2, DIM, DIM, generator=generator, dtype=torch.float64)
    if rank_deficient:
        mixes[..., DIM // 2 :, :] = 0
    queries, keys = torch.randn(2, 2, tokens, DIM, generator=generator, dtype=torch.float64) @ mixes
    return queries + 1.5, keys + 4.0


def pairwise_error(queries, keys, query_rows, key_rows):
    """Mean squared score error over all pairs, keys centred: the expectation, written out."""
    centred = keys - keys.mean(1, keepdim=True)
    exact = queries @ centred.mT
    low_rank = (queries @ query_rows.mT) @ (centred @ key_rows.mT).mT
    return ((exact - low_rank) ** 2).mean((1, 2))


@pytest.mark.parametrize("rank", [1, 3, DIM])
def test_expected_error_equals_the_mean_over_all_pairs_and_the_tail_of_the_singular_values(rank):
    queries, keys = draw(0)
    moments = moments_of(queries), moments_of(keys)
    basis = fit_score_basis(*moments)
    rows = basis.query_map[:, :rank], basis.key_map[:, :rank]
    expected = expected_score_error(*moments, *rows)
    scale = expected_score_error(*moments, rows[0] * 0, rows[1]).max().item()
    torch.testing.assert_close(expected, pairwise_error(queries, keys, *rows), rtol=1e-8, atol=1e-10 * scale)
    tail = (basis.singular_values[:, rank:] ** 2).sum(-1)
    torch.testing.assert_close(expected, tail, rtol=1e-8, atol=1e-10 * scale)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 9999), rank=st.integers(1, DIM), rank_deficient=st.booleans())
def test_never_larger_expected_error_than_pca_at_equal_rank(seed, rank, rank_deficient):
    queries, keys = draw(seed, rank_deficient)
    moments = moments_of(queries), moments_of(keys)
    basis, pca = fit_score_basis(*moments), fit_pca(moments[1])
    ours = expected_score_error(*moments, basis.query_map[:, :rank], basis.key_map[:, :rank])
    rows = pca.components[:, :rank]
    theirs = expected_score_error(*moments, rows, rows)
    total = expected_score_error(*moments, rows * 0, rows)
    assert (ours <= theirs + 1e-9 * total).all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 9999), rank=st.integers(1, DIM - 1))
def test_no_nearby_pair_of_maps_is_better(seed, rank):
    queries, keys = draw(seed)
    moments = moments_of(queries), moments_of(keys)
    basis = fit_score_basis(*moments)
    rows = basis.query_map[:, :rank], basis.key_map[:, :rank]
    best = expected_score_error(*moments, *rows)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(5):
        nudged = [r + 1e-3 * r.norm() * torch.randn(r.shape, generator=generator, dtype=r.dtype) for r in rows]
        assert (expected_score_error(*moments, *nudged) >= best * (1 - 1e-9)).all()


def test_rank_deficient_moments_give_finite_maps_and_exact_scores():
    queries, keys = draw(1, rank_deficient=True)
    moments = moments_of(queries), moments_of(keys)
    basis = fit_score_basis(*moments)
    assert basis.query_map.isfinite().all() and basis.key_map.isfinite().all()
    error = pairwise_error(queries, keys, basis.query_map, basis.key_map)
    assert (error < 1e-12 * (queries @ keys.mT).square().mean()).all()
