"""The patterns as the CLA paper words and counts them, and that every layer is in exactly one group."""

import itertools

import pytest

from kvcal.artifacts import KvcalError
from kvcal.calibrate.cla.patterns import PATTERNS, dense_back, dense_front, keep_ends, pattern_groups, uniform


def singles(*layers):
    return tuple((layer,) for layer in layers)


def test_uniform_of_the_papers_figure_2():
    assert uniform(10, 2) == ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9))
    assert uniform(10, 3) == ((0,), (1, 2, 3), (4, 5, 6), (7, 8, 9))


def test_keep_ends_of_20_layers():
    """Layer 0 by itself, 1 with 2, 3 with 4, …; the last layer is then by itself, too."""
    assert keep_ends(20, 2) == ((0,), *((first, first + 1) for first in range(1, 19, 2)), (19,))


def test_dense_front_of_20_layers():
    """10 non-CLA layers, 9 that use the KV of layer 9, the last with its own."""
    assert dense_front(20, 11) == (*singles(*range(9)), tuple(range(9, 19)), (19,))


def test_dense_back_of_20_layers_is_the_mirror_image_and_stores_what_the_table_says():
    mirrored = tuple(tuple(sorted(19 - layer for layer in group)) for group in reversed(dense_front(20, 11)))
    assert dense_back(20, 11) == mirrored == ((0,), tuple(range(1, 11)), *singles(*range(11, 20)))


@pytest.mark.parametrize(
    ("pattern", "group", "stored"),
    [("uniform", 2, 10), ("uniform", 3, 7), ("uniform", 4, 5), *((name, 2, 11) for name in PATTERNS[1:])],
)
def test_stored_layers_of_the_papers_table_1(pattern, group, stored):
    assert len(pattern_groups(pattern, range(20), group)) == stored


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_layer_is_in_one_group_of_neighbours(pattern):
    for count, group in itertools.product(range(2, 14), (1, 2, 3, 4)):
        if group > count:
            continue
        layers = [3 * layer + 1 for layer in range(count)]  # with sliding layers between them
        found = pattern_groups(pattern, layers, group)
        assert [layer for part in found for layer in part] == layers
        if pattern in ("uniform", "keep-ends"):
            assert max(map(len, found)) <= group


@pytest.mark.parametrize("pattern", ["dense-front", "dense-back"])
def test_dense_patterns_store_as_many_as_asked_for(pattern):
    for count in range(2, 12):
        for stored in range(2, count + 1):
            found = pattern_groups(pattern, range(count), stored=stored)
            assert len(found) == stored and sum(len(part) > 1 for part in found) == (stored < count)


def test_a_number_that_is_what_the_pattern_gives_is_taken():
    assert pattern_groups("uniform", range(20), 3, 7) == uniform(20, 3)


@pytest.mark.parametrize(
    ("pattern", "count", "group", "stored", "message"),
    [
        ("uniform", 1, 2, None, "1 full-attention layers: sharing needs at least 2"),
        ("uniform", 3, 4, None, "groups of 4 layers: this model has 3"),
        ("uniform", 20, 2, 9, "stores 10 of 20 layers, not 9: it stores 10 with --group 2, 7 with --group 3"),
        ("keep-ends", 20, 2, 10, "stores 11 of 20 layers, not 10"),
        ("dense-front", 20, 2, 1, "give 2 to 20"),
        ("dense-back", 20, 2, 21, "give 2 to 20"),
        ("dense", 20, 2, None, "unknown pattern 'dense': give uniform, keep-ends, dense-front, dense-back, auto"),
    ],
)
def test_refusals(pattern, count, group, stored, message):
    with pytest.raises(KvcalError, match=message):
        pattern_groups(pattern, range(count), group, stored)
