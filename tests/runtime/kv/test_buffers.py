"""Where new tokens of rows go that are left-aligned."""

import pytest
import torch

from kvcal.runtime.kv.buffers import find_places

CPU = torch.device("cpu")


def test_rows_of_one_length():
    places = find_places([4, 4], 2, None, CPU)
    assert places.after == [6, 6] and places.slots == slice(4, 6)
    assert places.limits.tolist() == [[5, 6], [5, 6]]
    assert find_places([0, 0, 0], 2, None, CPU).limits is None


@pytest.mark.parametrize("valid", [None, torch.ones(2, 1, dtype=torch.bool)])
def test_rows_of_unequal_lengths(valid):
    places = find_places([3, 5], 1, valid, CPU)
    assert places.after == [4, 6] and places.limits.tolist() == [[4], [6]]
    row, token, slot = places.slots
    assert (row.tolist(), token.tolist(), slot.tolist()) == ([0, 1], [0, 0], [3, 5])


def test_padding_is_dropped():
    places = find_places([3, 5], 2, torch.tensor([[False, True], [True, True]]), CPU)
    assert places.after == [4, 7] and places.limits.tolist() == [[3, 4], [6, 7]]
    row, token, slot = places.slots
    assert (row.tolist(), token.tolist(), slot.tolist()) == ([0, 1, 1], [1, 0, 1], [3, 5, 6])
