"""Bytes per token against table 1 of the CLA paper (20 layers, 16 bit)."""

import pytest

from kvcal.artifacts import KvcalError, Layer
from kvcal.calibrate.cla.cache_cost import bytes_per_token, layers_bytes_per_token
from kvcal.calibrate.cla.patterns import dense_back, dense_front, keep_ends, uniform
from kvcal.runtime.cla.sharing_map import SharingMap

TABLE_1 = [
    ("H128-MHA", 128, 16, None, 163840),
    ("H128-GQA4", 128, 4, None, 40960),
    ("H128-GQA2", 128, 2, None, 20480),
    ("H128-MQA", 128, 1, None, 10240),
    ("H64-MQA", 64, 1, None, 5120),
    ("H46-MQA", 46, 1, None, 3680),
    ("H32-MQA", 32, 1, None, 2560),
    ("H512-MQA-CLA2", 512, 1, 2, 20480),
    ("H256-MQA-CLA2", 256, 1, 2, 10240),
    ("H128-MQA-CLA2", 128, 1, 2, 5120),
    ("H90-MQA-CLA2", 90, 1, 2, 3600),
    ("H64-MQA-CLA2", 64, 1, 2, 2560),
    ("H256-GQA4-CLA2", 256, 4, 2, 40960),
    ("H128-GQA4-CLA2", 128, 4, 2, 20480),
    ("H128-GQA2-CLA2", 128, 2, 2, 10240),
    ("H128-MQA-CLA3", 128, 1, 3, 3584),
    ("H128-MQA-CLA4", 128, 1, 4, 2560),
    ("H128-MQA-CLA2-KeepEnds", 128, 1, SharingMap(keep_ends(20, 2)), 5632),
    ("H128-MQA-CLA2-DenseFront", 128, 1, SharingMap(dense_front(20, 11)), 5632),
    ("H128-MQA-CLA2-DenseBack", 128, 1, SharingMap(dense_back(20, 11)), 5632),
]


@pytest.mark.parametrize(
    ("head_dim", "kv_heads", "sharing", "expected"), [row[1:] for row in TABLE_1], ids=[row[0] for row in TABLE_1]
)
def test_the_papers_table_1(head_dim, kv_heads, sharing, expected):
    assert bytes_per_token(20, kv_heads, head_dim, sharing=sharing) == expected
    if isinstance(sharing, int):
        assert bytes_per_token(20, kv_heads, head_dim, sharing=SharingMap(uniform(20, sharing))) == expected


def test_the_papers_3b_models():
    """Tables 5 and 7: 32 layers."""
    assert bytes_per_token(32, 1, 128) == 16384 and bytes_per_token(32, 1, 128, sharing=2) == 8192
    assert bytes_per_token(32, 1, 64) == 8192 and bytes_per_token(32, 1, 64, sharing=2) == 4096


def test_element_size_and_value_dim_are_factors():
    assert bytes_per_token(3, 5, 7, element_bytes=4) == 3 * 5 * (7 + 7) * 4
    assert bytes_per_token(3, 5, 7, value_dim=11) == 3 * 5 * (7 + 11) * 2


def test_layers_of_different_shapes_and_sliding_ones():
    shapes = [(2, 8, 8, None), (2, 8, 8, None), (4, 8, 6, None), (2, 8, 8, 32)]
    layers = [
        Layer(i, heads, 4, dim, value, 1.0, window, "none") for i, (heads, dim, value, window) in enumerate(shapes)
    ]
    assert layers_bytes_per_token(layers) == 2 * (2 * 16 + 2 * 16 + 4 * 14)
    assert layers_bytes_per_token(layers, SharingMap.parse("0-1,2"), element_bytes=4) == 4 * (2 * 16 + 4 * 14)


@pytest.mark.parametrize(
    "wrong", [{"layers": 0}, {"kv_heads": 0}, {"head_dim": 0}, {"element_bytes": 0}, {"sharing": 0}]
)
def test_nothing_below_one(wrong):
    with pytest.raises(KvcalError, match="must be at least 1"):
        bytes_per_token(**({"layers": 2, "kv_heads": 1, "head_dim": 4} | wrong))
