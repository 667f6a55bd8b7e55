"""How much of each layer's loss reaches the model's predictions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

_LEAST = 1e-12


def weights(
    moved: Mapping[int, float], losses: Mapping[int, float], by_row: Mapping[int, Sequence[float]]
) -> dict[int, float]:
    """By layer: how far predictions diverge where it alone has a cheap setting, over its loss with that setting. Both
    grow with the square of what attention misses, so that one setting's ratio holds for the others.

    A few rows give a noisy weight: logarithms are drawn to their mean by the share of their variance that is noise,
    which the spread of the rows gives (empirical Bayes). With a single row, all weights are equal.

    Args:
        moved: divergences by layer.
        losses: of the same settings.
        by_row: what `moved` are means of.
    """
    logarithms = {layer: math.log(max(moved[layer], _LEAST) / max(losses[layer], _LEAST)) for layer in moved}
    centre = statistics.fmean(logarithms.values())
    trust = _trust(list(logarithms.values()), list(by_row.values()))
    return {layer: math.exp(centre + trust * (logarithm - centre)) for layer, logarithm in logarithms.items()}


def _trust(logarithms: Sequence[float], by_row: Sequence[Sequence[float]]) -> float:
    """The share of the variance of `logarithms` that is not noise. The noise of a mean's logarithm is the mean's
    relative error, squared."""
    if len(logarithms) < 2 or len(by_row[0]) < 2:
        return 0.0
    spread = statistics.variance(logarithms)
    noise = [statistics.variance(rows) / len(rows) / max(statistics.fmean(rows), _LEAST) ** 2 for rows in by_row]
    return max(0.0, 1 - statistics.fmean(noise) / spread) if spread else 0.0
