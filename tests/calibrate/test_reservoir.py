import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from kvcal.calibrate.reservoir import ReservoirSample, SampledRows, priorities


def run(tokens, batches, capacity, seed=0):
    """Samples a stream whose rows are functions of the token index, and returns (tokens, rows)."""
    sample, rows = ReservoirSample(capacity, seed), SampledRows(capacity, 2, 3, torch.float64)
    for part in torch.tensor(tokens).split(batches):
        rows.update(rows_of(part), sample.place(part))
    order = sample.order()
    return sample.token[order], rows.finalize(order)


def rows_of(tokens):
    return torch.stack(
        [tokens.double()[:, None] + torch.tensor([0.1, 0.2, 0.3]), -tokens.double()[:, None].expand(-1, 3)]
    )


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 120),
    capacity=st.integers(2, 40),
    batch=st.integers(1, 130),
    seed=st.integers(0, 2**40),
    shuffle=st.randoms(use_true_random=False),
)
def test_sample_does_not_depend_on_batches_or_order(count, capacity, batch, seed, shuffle):
    whole = list(range(1000, 1000 + count))
    mixed = list(whole)
    shuffle.shuffle(mixed)
    tokens, rows = run(whole, count, capacity, seed)
    again, same_rows = run(mixed, batch, capacity, seed)
    assert torch.equal(tokens, again) and torch.equal(rows, same_rows)
    # The definition: the tokens of lowest priority, each with its own row.
    expected = sorted(whole, key=lambda token: priorities(torch.tensor([token]), seed).item())[:capacity]
    assert tokens.tolist() == sorted(expected)
    assert torch.equal(rows, rows_of(tokens))


@settings(max_examples=25, deadline=None)
@given(count=st.integers(2, 100), cut=st.integers(1, 99), capacity=st.integers(2, 30))
def test_merged_samples_are_the_sample_of_the_union(count, cut, capacity):
    tokens = torch.arange(count)
    parts = []
    for part in (tokens[:cut], tokens[cut:]):
        sample, rows = ReservoirSample(capacity, 0), SampledRows(capacity, 2, 3, torch.float64)
        rows.update(rows_of(part), sample.place(part))
        parts.append((sample, rows))
    (sample, rows), (other, other_rows) = parts
    rows.update(other_rows.rows, sample.place(other.token))
    expected, expected_rows = run(range(count), count, capacity)
    order = sample.order()
    assert torch.equal(sample.token[order], expected)
    assert torch.equal(rows.finalize(order), expected_rows)


def test_every_token_is_equally_likely():
    hits = torch.zeros(200)
    for seed in range(400):
        sample = ReservoirSample(20, seed)
        sample.place(torch.arange(200))
        hits[sample.token] += 1
    assert stats.chisquare(hits.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("other", [1, 2, 12345])
def test_another_seed_gives_another_sample(other):
    assert not torch.equal(run(range(500), 500, 50)[0], run(range(500), 500, 50, seed=other)[0])
