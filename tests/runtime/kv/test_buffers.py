"""Where new tokens of rows go that are left-aligned."""

import pytest
import torch

from kvcal.runtime.kv.buffers import find_places, visible

CPU = torch.device("cpu")


def test_rows_of_one_length():
    places = find_places([4, 4], 2, None, CPU)
    assert places.after == [6, 6] and places.slots == slice(4, 6)
    assert visible([6, 6], 2, None, CPU).tolist() == [[5, 6], [5, 6]]
    assert visible([2, 2, 2], 2, None, CPU) is None


@pytest.mark.parametrize("valid", [None, torch.ones(2, 1, dtype=torch.bool)])
def test_rows_of_unequal_lengths(valid):
    places = find_places([3, 5], 1, valid, CPU)
    assert places.after == [4, 6] and visible([4, 6], 1, valid, CPU).tolist() == [[4], [6]]
    row, token, slot = places.slots
    assert (row.tolist(), token.tolist(), slot.tolist()) == ([0, 1], [0, 0], [3, 5])


def test_padding_is_dropped():
    valid = torch.tensor([[False, True], [True, True]])
    places = find_places([3, 5], 2, valid, CPU)
    assert places.after == [4, 7] and visible([4, 7], 2, valid, CPU).tolist() == [[3, 4], [6, 7]]
    row, token, slot = places.slots
    assert (row.tolist(), token.tolist(), slot.tolist()) == ([0, 1, 1], [1, 0, 1], [3, 5, 6])
