"""The dynamic program against every partition there is."""

import itertools
import math

import pytest
import torch

from kvcal.artifacts import KvcalError
from kvcal.calibrate.cla.grouping import best_grouping


def every_grouping(count, stored):
    for cuts in itertools.combinations(range(1, count), stored - 1):
        yield tuple(tuple(range(*ends)) for ends in itertools.pairwise((0, *cuts, count)))


def price(cost, groups):
    return sum(float(cost[group[0], group[-1]]) for group in groups if len(group) > 1)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("seed", range(3))
def test_no_partition_is_cheaper(count, seed):
    cost = torch.rand(count, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for stored in range(1, count + 1):
        found = best_grouping(cost, stored)
        assert found in set(every_grouping(count, stored))
        assert price(cost, found) == pytest.approx(min(price(cost, groups) for groups in every_grouping(count, stored)))


@pytest.mark.parametrize("seed", range(5))
def test_pairs_that_cannot_share_never_do(seed):
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(7, 7, generator=generator, dtype=torch.float64)
    cost[torch.rand(7, 7, generator=generator) < 0.3] = math.nan
    for stored in range(1, 8):
        allowed = [groups for groups in every_grouping(7, stored) if not math.isnan(price(cost, groups))]
        if not allowed:
            with pytest.raises(KvcalError, match=f"no grouping into {stored} stored layers"):
                best_grouping(cost, stored)
        else:
            assert price(cost, best_grouping(cost, stored)) == pytest.approx(
                min(price(cost, groups) for groups in allowed)
            )


def test_long_groups_where_layers_are_alike():
    """Layers 2 to 5 are one and the same: with three stored they are what is shared."""
    cost = torch.ones(7, 7, dtype=torch.float64)
    cost[2:6, 2:6] = 0
    assert best_grouping(cost, 4) == ((0,), (1,), (2, 3, 4, 5), (6,))


def test_equal_costs_give_equal_groups():
    cost = torch.ones(6, 6, dtype=torch.float64)
    assert best_grouping(cost, 3) == best_grouping(cost.clone(), 3) == ((0,), (1,), (2, 3, 4, 5))


@pytest.mark.parametrize("stored", [0, 5])
def test_more_groups_than_layers(stored):
    with pytest.raises(KvcalError, match="give 1 to 4"):
        best_grouping(torch.ones(4, 4), stored)
