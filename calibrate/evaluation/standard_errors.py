"""Means, ratios and their standard errors, over windows or samples that are independent of one another.

A method and `full` are measured on the same windows and samples, so ratios are paired: what is common to both, that a
text is hard to predict or a question hard to answer, is not counted as doubt about the ratio.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

Estimate = tuple[float | None, float | None]
"""(value, its standard error); None where it is not a number, or where one sample says nothing about its spread."""


def mean(values: Sequence[float]) -> Estimate:
    """x̄ and s / √n, s with n - 1."""
    if not values or not all(map(math.isfinite, values)):
        return None, None
    return math.fsum(values) / len(values), _error(values)


def perplexity(nll: Sequence[float]) -> Estimate:
    """exp(x̄) of mean negative log-likelihoods by window, all of equally many tokens; by the delta method its error is
    exp(x̄) times that of x̄."""
    return _exponential(*mean(nll))


def perplexity_ratio(nll: Sequence[float], base: Sequence[float]) -> Estimate:
    """exp(d̄) of the differences by window, which is the ratio of the perplexities; its error is exp(d̄) · s_d / √n."""
    return _exponential(*mean([a - b for a, b in zip(nll, base, strict=True)]))


def relative(scores: Sequence[float], base: Sequence[float]) -> Estimate:
    """R = ȳ / x̄ of scores over `base`, paired by sample; by the delta method its error is s / (x̄ √n) of the
    residuals y - R x. None where `base` is 0 throughout."""
    (top, _), (bottom, _) = mean(scores), mean(base)
    if top is None or not bottom:
        return None, None
    ratio = top / bottom
    error = _error([y - ratio * x for y, x in zip(scores, base, strict=True)])
    return ratio, None if error is None else error / bottom


def mean_of(estimates: Sequence[Estimate]) -> Estimate:
    """Mean of estimates of different samples, e.g. of the scores of several tasks: errors add up as squares."""
    values = [value for value, _ in estimates]
    if not values or None in values:
        return None, None
    errors = [error for _, error in estimates]
    value = math.fsum(value for value in values if value is not None) / len(values)
    if None in errors:
        return value, None
    return value, math.sqrt(math.fsum(error**2 for error in errors if error is not None)) / len(errors)


def _error(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _exponential(value: float | None, error: float | None) -> Estimate:
    if value is None or value > 700:
        return None, None
    found = math.exp(value)
    return found, None if error is None else found * error
