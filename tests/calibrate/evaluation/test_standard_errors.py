"""Standard errors against numpy, scipy and the jackknife."""

import numpy as np
import pytest
import scipy.stats

from kvcal.calibrate.evaluation.rows import compared, low_scores
from kvcal.calibrate.evaluation.standard_errors import mean, mean_of, perplexity, perplexity_ratio, relative

RANDOM = np.random.default_rng(0)
BASE = RANDOM.normal(3, 0.5, 12)
NLL = BASE + RANDOM.normal(0.02, 0.01, 12)
"""Hard windows are hard for both: the ratio is known far better than either perplexity."""
ANSWERED = RANDOM.integers(0, 2, 40).astype(float)
BY_FULL = np.maximum(ANSWERED, RANDOM.integers(0, 2, 40))


def jackknife(statistic, *samples):
    """Standard error from leaving out one sample at a time: √((n - 1) / n · Σ (x_i - x̄)²)."""
    count = len(samples[0])
    left = np.array([statistic(*(np.delete(each, at) for each in samples)) for at in range(count)])
    return np.sqrt((count - 1) / count * ((left - left.mean()) ** 2).sum())


def test_a_mean_has_the_standard_error_of_scipy():
    assert mean(list(NLL)) == pytest.approx((np.mean(NLL), scipy.stats.sem(NLL)))
    assert mean([3.0]) == (3.0, None) and mean([]) == (None, None) and mean([1.0, float("nan")]) == (None, None)


def test_perplexity_and_its_error():
    value, error = perplexity(list(NLL))
    assert value == pytest.approx(np.exp(NLL.mean())) and error == pytest.approx(value * scipy.stats.sem(NLL))
    assert error == pytest.approx(jackknife(lambda nll: np.exp(nll.mean()), NLL), rel=0.05)
    assert perplexity([800.0, 801.0]) == perplexity([float("inf"), 1.0]) == (None, None)


def test_the_ratio_is_that_of_the_perplexities_and_its_error_is_paired():
    value, error = perplexity_ratio(list(NLL), list(BASE))
    assert value == pytest.approx(np.exp(NLL.mean()) / np.exp(BASE.mean()))
    differences = NLL - BASE
    assert error == pytest.approx(value * differences.std(ddof=1) / np.sqrt(len(differences)))
    assert error == pytest.approx(jackknife(lambda a, b: np.exp(a.mean() - b.mean()), NLL, BASE), rel=0.05)
    unpaired = value * np.hypot(scipy.stats.sem(NLL), scipy.stats.sem(BASE))
    assert error < unpaired / 10


def test_relative_scores_are_ratios_of_means_with_paired_errors():
    value, error = relative(list(ANSWERED), list(BY_FULL))
    assert value == pytest.approx(ANSWERED.mean() / BY_FULL.mean())
    residuals = ANSWERED - value * BY_FULL
    assert error == pytest.approx(residuals.std(ddof=1) / np.sqrt(len(residuals)) / BY_FULL.mean())
    assert error == pytest.approx(jackknife(lambda a, b: a.mean() / b.mean(), ANSWERED, BY_FULL), rel=0.05)
    assert relative(list(BY_FULL), list(BY_FULL)) == (1.0, 0.0)  # what both answer alike says nothing of their ratio
    assert relative([0.0, 1.0], [0.0, 0.0]) == (None, None)


def test_the_mean_of_tasks_adds_errors_as_squares():
    """Against the stratified mean's: the variance of a sum of independent means."""
    groups = [RANDOM.random(8), RANDOM.random(20), RANDOM.random(5)]
    value, error = mean_of([mean(list(group)) for group in groups])
    assert value == pytest.approx(np.mean([group.mean() for group in groups]))
    variance = sum(group.var(ddof=1) / len(group) for group in groups) / len(groups) ** 2
    assert error == pytest.approx(np.sqrt(variance))
    assert mean_of([(0.5, None), (0.7, 0.1)]) == (pytest.approx(0.6), None)


def test_rows_are_compared_where_both_were_measured():
    full = {"window_nll": [1.0, 2.0], "sample_scores": {"a@1": [1.0, 0.0, 1.0]}, "scores": {"a@1": 2 / 3, "b@1": 0.9}}
    row = {"window_nll": [1.0, 2.5], "sample_scores": {"a@1": [1.0, 0.0, 0.0], "c@1": [1.0]}}
    found = compared(row, full)
    assert found["perplexity_ratio"] == pytest.approx(np.exp(0.25))
    assert found["perplexity_ratio_se"] == pytest.approx(np.exp(0.25) * scipy.stats.sem([0.0, 0.5]))
    assert found["relative"] == {"a@1": pytest.approx(0.5)}
    assert compared({"window_nll": [1.0, None]}, full)["perplexity_ratio"] is None
    assert low_scores(full) == {"a@1": pytest.approx(2 / 3)}
