"""The grouping of least predicted loss, by dynamic programming over groups of neighbouring layers."""

from __future__ import annotations

import math

from torch import Tensor

from ...artifacts import KvcalError
from .patterns import Groups


def best_grouping(cost: Tensor, stored: int) -> Groups:
    """Split layers 0 … n - 1 into `stored` groups of neighbours with the least sum of costs.

    With best[k][j] the least cost of the first j layers in k groups,
    best[k][j] = min over i < j of best[k - 1][i] + (cost of the group i … j - 1): O(n²) per number of groups.

    Args:
        cost: [n, n], [a, b] for the group of layers a to b, at least 0; NaN or infinite where they cannot share. A
            layer by itself costs nothing.
        stored: groups, each of which stores one layer.

    Returns:
        The groups in ascending order. Of equally good ones that whose last group begins first (and so on for the
        layers before it), so that equal costs give equal groups.

    Raises:
        KvcalError: more groups than layers, or no way to share so much.
    """
    count = len(cost)
    if not 1 <= stored <= count:
        raise KvcalError(f"{stored} stored layers: give 1 to {count}, the full-attention layers of this model")
    group = [[math.inf if math.isnan(price) else price for price in row] for row in cost.tolist()]
    for layer in range(count):
        group[layer][layer] = 0.0
    best = [math.inf] * (count + 1)
    best[0] = 0.0
    starts: list[list[int]] = []
    for _ in range(stored):
        candidates = [
            min(((best[first] + group[first][end - 1], first) for first in range(end)), default=(math.inf, 0))
            for end in range(count + 1)
        ]
        best = [price for price, _ in candidates]
        starts.append([first for _, first in candidates])
    if math.isinf(best[count]):
        raise KvcalError(
            f"no grouping into {stored} stored layers: too many neighbouring layers cannot share "
            "(they differ in shape or rotary embedding): give a larger --budget-layers"
        )
    groups: list[tuple[int, ...]] = []
    end = count
    for chosen in reversed(starts):
        first = chosen[end]
        groups.append(tuple(range(first, end)))
        end = first
    return tuple(reversed(groups))
