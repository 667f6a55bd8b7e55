"""`select_threshold` against a sort of every row in float64: exact, ties and all."""

import numpy as np
import pytest
import torch
from compiling import compiled
from select_problem import (
    BOTH,
    DTYPES,
    INF,
    NAN,
    POISON,
    assert_selects,
    best,
    difficult,
    poisoned,
    spoil_beyond,
)
from torch import Tensor

from kvcal.kernels.select import select_threshold

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # the interpreter's, of thresholds


@BOTH
@DTYPES
@pytest.mark.parametrize("tokens", [200, 1000])
@pytest.mark.parametrize("capacity", [40, 1000])
def test_a_threshold_takes_all_that_reach_it_or_exactly_the_best(capacity, tokens, dtype, small_tiles, backend, device):
    normal = torch.randn(tokens, generator=torch.Generator().manual_seed(4)).to(dtype)
    tiny = torch.finfo(dtype).tiny
    held = normal[7].float().item()
    thresholds = [
        INF, -INF, NAN, 100.0, -100.0, 1.5, held, np.nextafter(np.float32(held), np.float32(INF)),
        np.nextafter(np.float32(held), np.float32(-INF)), 70000.0, -70000.0,
    ]  # fmt: skip
    scores = normal.expand(len(thresholds), 1, -1).contiguous()
    scores[2, 0, ::5] = NAN
    scores[1, 0, ::7] = -INF
    scores[0, 0, 3:9] = INF
    small = torch.arange(tokens).sub(tokens // 2).mul(tiny / 64)
    around_zero = torch.stack([small, small, small, torch.where(torch.arange(tokens) % 2 == 0, 0.0, -0.0)]).to(dtype)
    scores = torch.cat([scores, around_zero[:, None]])
    thresholds += [0.0, -0.0, float(tiny) / 2, 0.0]
    threshold = torch.tensor(thresholds, dtype=torch.float32)[:, None].to(device)
    lengths = torch.full((len(scores),), tokens, dtype=torch.int32, device=device)
    lengths[1::2] = tokens - 3
    scores = spoil_beyond(scores.to(device), lengths)
    out = poisoned(scores.shape[:2], capacity, device)
    result = select_threshold(scores, threshold, lengths, capacity, out=out, backend=backend)
    assert result[0] is out[0] and result[1] is out[1]
    assert_selects(result, scores, lengths, capacity, capacity, threshold)


def between(row: Tensor, length: int, threshold: float, least: int, most: int) -> list[int]:
    """The definition: what reaches the threshold, if that is from `least` to `most`; else so many of the best."""
    reaching = best(row, length, len(row), threshold)
    return best(row, length, min(max(len(reaching), least), most))


CHOSEN = ("random", "all equal", "few values", "denormal", "nearly all -inf", "all -inf", "some NaN", "rising")
"""Of the difficulties, as rows."""


@BOTH
@pytest.mark.parametrize(
    ("tokens", "dtype", "shape"),
    [(200, torch.float16, "numbers"), (600, torch.float16, "rows"), (600, torch.float32, "numbers")],
    ids=str,
)
def test_a_threshold_that_few_or_many_reach(shape, tokens, dtype, small_tiles, backend, device):
    """From `least` to `most` of each row, ties and all, in tiles, in parts and in lists of several tiles."""
    scores = difficult(tokens, dtype, device, CHOSEN)
    rows, capacity = len(scores), tokens * 3 // 5
    number = torch.arange(rows, dtype=torch.int32, device=device)
    lengths = tokens - number % 3
    scores = spoil_beyond(scores, lengths)
    bounds = [(0, capacity), (30, 40), (40, 40), (capacity - 1, capacity), (60, 20), (capacity + 5, capacity)]
    for turn, threshold in enumerate((-INF, 0.0, 1.0, 1.6, NAN, INF)):
        thresholds = torch.full((rows, 1), threshold, device=device)
        least, most = bounds[turn]
        if shape == "rows":  # each row has its own, from below 0
            least, most = ((number * 53 + turn) % (capacity // 2) - 1), (number * 131 + 40 * turn) % capacity
        out = poisoned((rows, 1), capacity, device)
        index, count = select_threshold(
            scores, thresholds, lengths, capacity, least=least, most=most, out=out, backend=backend
        )
        for row in range(rows):
            low, high = (int(of) if isinstance(of, int) else int(of[row]) for of in (least, most))
            expected = between(scores[row, 0], int(lengths[row]), threshold, low, min(high, capacity))
            assert index[row, 0].tolist() == expected + [0] * (capacity - len(expected)), (row, threshold)
            assert int(count[row, 0]) == len(expected)
        assert index._base.flatten()[index.numel() :].eq(POISON).all(), "written beyond the last slot"


@DTYPES
def test_a_sample_that_misleads_finds_the_least_best_all_the_same(dtype, small_tiles, device):
    number = torch.arange(64)
    sampled = number * 16 + (((number * 2654435769) % 2**32 >> 17) * 16 >> 15)
    scores = torch.randn(1, 1, 1024, generator=torch.Generator().manual_seed(3))
    scores[..., sampled] += 50
    scores, lengths = scores.to(dtype).to(device), torch.tensor([1024], dtype=torch.int32, device=device)
    for threshold in (100.0, 49.0, 0.0):
        out = poisoned((1, 1), 400, device)
        limit = torch.full((1, 1), threshold, device=device)
        index, count = select_threshold(scores, limit, lengths, 400, least=200, out=out, backend="triton")
        expected = between(scores[0, 0], 1024, threshold, 200, 400)
        assert index[0, 0, : int(count)].tolist() == expected


def test_compiles_for_hopper_and_once_for_all_bounds():
    """A tile fills the registers: the float16 kernel with a threshold spills six of them."""
    pytest.importorskip("triton")
    launches = compiled("""
import torch
from kvcal.kernels.select import select_threshold
def launch(dtype, tokens, capacity, **bounds):
    scores, lengths = torch.zeros(2, 8, tokens, dtype=dtype), torch.zeros(2, dtype=torch.int32)
    bounds = {name: lengths if bound is None else bound for name, bound in bounds.items()}
    select_threshold(scores, torch.zeros(2, 8), lengths, capacity, **bounds, backend="triton")
launch(torch.float16, 16384, 64)
launch(torch.float16, 4096, 100, least=7, most=50)
launch(torch.float32, 16384, 64, least=None, most=None)
""")
    assert all(launch["stack"] <= 24 for launch in launches), launches
    assert launches[0]["hash"] == launches[1]["hash"]


def test_what_does_not_fit_is_named():
    scores, lengths = torch.zeros(2, 1, 8), torch.full((2,), 8, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"threshold: received torch.float32 \[2\]"):
        select_threshold(scores, torch.zeros(2), lengths, 3)
    for bounds, message in [
        ({"least": -1}, "least: received -1, expected at least 0"),
        ({"most": -1}, "most: received -1, expected at least 0"),
        ({"least": lengths[:1]}, r"least: received torch.int32 \[1\]"),
        ({"most": lengths.long()}, r"most: received torch.int64 \[2\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            select_threshold(scores, torch.zeros(2, 1), lengths, 3, **bounds)
