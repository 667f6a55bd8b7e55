"""`select` and `select_threshold` against a sort of every row in float64: exact, ties and all."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from compiling import compiled

from kvcal.kernels.select import select, select_threshold
from kvcal.kernels.select import triton_kernel as kernel

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # the interpreter's, of thresholds

INF, NAN = float("inf"), float("nan")
POISON = -7
BOTH = pytest.mark.parametrize("backend", ["triton", "reference"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])

SMALL = {"TILE": 256, "RUN": 8, "SAMPLE": 64, "GRAIN": 32, "SMALLEST_PART": 256, "MOST_PARTS": 4, "WARPS": 1}
"""With these sizes rows beyond 256 are dealt to several programs, and lists beyond 256 are read in several tiles."""


@pytest.fixture
def small_tiles(monkeypatch):
    for name, size in SMALL.items():
        monkeypatch.setattr(kernel, name, size)


def best(scores: Tensor, length: int, k: int, threshold: float = -INF) -> list[int]:
    """The definition: a lexicographic sort of one row by (falling score, rising index)."""
    row = scores.double().cpu().numpy()[:length]
    token = np.flatnonzero((row > -INF) & (row >= threshold))
    return sorted(token[np.lexsort((token, -row[token]))][: max(k, 0)].tolist())


def assert_selects(result, scores, lengths, k, capacity, threshold=None):
    index, count = result
    assert index.dtype == count.dtype == torch.int32 and index.shape == (*scores.shape[:2], capacity)
    for b, h in itertools.product(*map(range, scores.shape[:2])):
        budget = min(capacity, k if isinstance(k, int) else int(k[b]))
        bound = -INF if threshold is None else float(threshold[b, h])
        expected = best(scores[b, h], int(lengths[b]), budget, bound)
        assert int(count[b, h]) == len(expected), (b, h)
        assert index[b, h].tolist() == expected + [0] * (capacity - len(expected)), (b, h)
    if index._base is not None:
        assert index._base.flatten()[index.numel() :].eq(POISON).all(), "written beyond the last slot"


def poisoned(rows, capacity, device):
    """Outputs to write, the index as the beginning of a longer buffer."""
    size = torch.Size(rows).numel() * capacity
    buffer = torch.full((size + 8,), POISON, dtype=torch.int32, device=device)
    return buffer[:size].view(*rows, capacity), torch.full(rows, POISON, dtype=torch.int32, device=device)


def difficult(tokens: int, dtype: torch.dtype, device, names: tuple[str, ...] = ()) -> Tensor:
    """[B, 1, tokens]: each row another difficulty, of those named or of all, the same in both dtypes."""
    generator = torch.Generator().manual_seed(tokens)
    normal = torch.randn(tokens, generator=generator)
    coin = torch.rand(tokens, generator=generator)
    tiny = torch.finfo(dtype).smallest_normal
    rows = {
        "random": normal,
        "far from zero": 1000 + normal,
        "all equal": torch.full((tokens,), -1.5),
        "few values": (3 * normal).round(),
        "one among equals": torch.zeros(tokens).index_fill(0, torch.tensor([tokens // 3]), 1.0),
        "both zeros": torch.where(coin < 0.5, 0.0, -0.0),
        "zeros among others": torch.where(coin < 0.3, 0.0, torch.where(coin < 0.6, -0.0, normal)),
        "denormal": normal * tiny / 4,
        "some -inf": torch.where(coin < 0.5, -INF, normal),
        "nearly all -inf": torch.where(coin < 0.98, -INF, normal),
        "all -inf": torch.full((tokens,), -INF),
        "some inf": torch.where(coin < 0.05, INF, normal),
        "some NaN": torch.where(coin < 0.2, NAN, torch.where(coin < 0.4, -NAN, normal)),
        "all NaN": torch.full((tokens,), NAN),
        "the last are best": normal + torch.arange(tokens).ge(tokens - tokens // 8) * 100,
        "rising": torch.arange(tokens) / 16 - 20,
        "falling": torch.arange(tokens).neg() / 16 + 20,
        "a tie follows the last chosen": torch.full((tokens,), 2.0),
    }
    return torch.stack([rows[name] for name in names or rows]).to(dtype)[:, None].to(device)


def spoil_beyond(scores: Tensor, lengths: Tensor) -> Tensor:
    """What stands beyond a row's length would win every selection."""
    token = torch.arange(scores.shape[-1], device=scores.device)
    beyond = torch.where(token % 2 == 0, INF, NAN).to(scores.dtype)
    return torch.where(token < lengths[:, None, None], scores, beyond)


@BOTH
@DTYPES
@pytest.mark.parametrize("k", [1, 37, 301])
def test_every_difficulty_in_one_tile(k, dtype, backend, device):
    scores = difficult(300, dtype, device)
    lengths = torch.full((len(scores),), 300, dtype=torch.int32, device=device)
    lengths[::3] = 299
    lengths[1::3] = 253
    scores = spoil_beyond(scores, lengths)
    out = poisoned(scores.shape[:2], k, device)
    result = select(scores, k, lengths, out=out, backend=backend)
    assert result[0] is out[0] and result[1] is out[1]
    assert_selects(result, scores, lengths, k, k)


@DTYPES
@pytest.mark.parametrize("k", [60, 400])
def test_every_difficulty_in_parts_and_lists(k, dtype, small_tiles, device):
    scores = difficult(608, dtype, device)
    lengths = torch.full((len(scores),), 608, dtype=torch.int32, device=device)
    lengths[::3] = 601
    lengths[1::3] = 257
    scores = spoil_beyond(scores, lengths)
    result = select(scores, k, lengths, out=poisoned(scores.shape[:2], k, device), backend="triton")
    assert_selects(result, scores, lengths, k, k)


@BOTH
@pytest.mark.parametrize("capacity", [64, 200])
def test_k_differs_by_row_and_from_the_slots(capacity, small_tiles, backend, device):
    scores = torch.randn(6, 2, 500, generator=torch.Generator().manual_seed(1)).half().to(device)
    k = torch.tensor([0, 1, 64, 150, 1000, -3], dtype=torch.int32, device=device)
    lengths = torch.tensor([500, 1, 500, 499, 90, 500], dtype=torch.int32, device=device)
    out = poisoned(scores.shape[:2], capacity, device)
    result = select(scores, k, lengths, capacity_out=capacity, out=out, backend=backend)
    assert_selects(result, scores, lengths, k, capacity)
    fixed = select(scores, 100, lengths, capacity_out=capacity, backend=backend)
    assert_selects(fixed, scores, lengths, 100, capacity)


@pytest.mark.parametrize("tokens", [1, 7, 300, 303])
def test_rows_of_a_larger_buffer(tokens, small_tiles, device):
    wide = torch.randn(2, 3, tokens + 13, generator=torch.Generator().manual_seed(2)).to(device)
    scores = wide[:, ::2, 5 : 5 + tokens]
    lengths = torch.tensor([tokens, max(1, tokens - 2)], dtype=torch.int32, device=device)
    for view in (scores, scores.transpose(0, 1)[:, :, :tokens]):
        result = select(view, 20, lengths, out=poisoned(view.shape[:2], 20, device), backend="triton")
        assert_selects(result, view, lengths, 20, 20)


@DTYPES
def test_a_sample_that_misleads_costs_time_only(dtype, small_tiles, device):
    """The few high scores stand where the kernel samples: its bound is then above the k-th best."""
    number = torch.arange(64)
    sampled = number * 16 + (((number * 2654435769) % 2**32 >> 17) * 16 >> 15)
    scores = torch.randn(1, 1, 1024, generator=torch.Generator().manual_seed(3))
    scores[..., sampled] += 50
    scores, lengths = scores.to(dtype).to(device), torch.tensor([1024], dtype=torch.int32, device=device)
    for k in (200, 300):
        result = select(scores, k, lengths, out=poisoned((1, 1), k, device), backend="triton")
        assert_selects(result, scores, lengths, k, k)


def test_the_callers_workspace_is_left_as_it_was(small_tiles, device):
    arrivals = torch.zeros(4, dtype=torch.int32, device=device)
    lengths = torch.tensor([600, 200], dtype=torch.int32, device=device)
    for seed in range(2):
        scores = torch.randn(2, 2, 600, generator=torch.Generator().manual_seed(seed)).to(device)
        assert_selects(select(scores, 30, lengths, arrivals=arrivals, backend="triton"), scores, lengths, 30, 30)
        assert not arrivals.any()


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


@pytest.mark.parametrize("pairs", [1, 8, 24, 64, 128, 200])
def test_one_program_for_each_multiprocessor_at_the_most(pairs):
    for tokens in (1, kernel.TILE, kernel.TILE + 1, 131072):
        parts = kernel.parts_of(pairs, tokens)
        assert 1 <= parts <= kernel.MOST_PARTS and (parts == 1 or (tokens > kernel.TILE and parts * pairs <= 128))


def test_what_does_not_fit_is_named():
    scores, lengths = torch.zeros(2, 1, 8), torch.full((2,), 8, dtype=torch.int32)
    for arguments, message in [
        ((scores.double(), 3, lengths), r"scores: received torch.float64 \[2, 1, 8\], expected float16 or float32"),
        ((scores.expand(2, 1, 8)[..., ::2], 3, lengths), "scores: received stride 2 along S, expected 1"),
        ((scores, 3, lengths.long()), r"lengths: received torch.int64 \[2\] on cpu, expected contiguous torch.int32"),
        ((scores, 0, lengths), "k: received 0, expected at least 1"),
        ((scores, lengths, lengths), "capacity_out: received None, expected the slots"),
    ]:
        with pytest.raises(ValueError, match=message):
            select(*arguments)
    with pytest.raises(ValueError, match="capacity_out: received 0"):
        select(scores, 3, lengths, capacity_out=0)
    with pytest.raises(ValueError, match=r"k: received torch.int32 \[1\]"):
        select(scores, lengths[:1], lengths, capacity_out=2)
    with pytest.raises(ValueError, match=r"out index: received torch.int32 \[2, 1, 4\]"):
        select(scores, 3, lengths, out=poisoned((2, 1), 4, "cpu"))
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


ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="long rows need a GPU")


@ON_GPU
@DTYPES
@pytest.mark.parametrize("k", [1, 2048, 32768])
@pytest.mark.parametrize("heads", [2, 64, 200])
def test_long_rows(heads, k, dtype, device):
    generator = torch.Generator(device).manual_seed(5)
    scores = torch.randn(2, heads, 131072, device=device, generator=generator).to(dtype)
    lengths = torch.tensor([131072, 100003], dtype=torch.int32, device=device)
    scores = spoil_beyond(scores, lengths)
    expected = select(scores, k, lengths, backend="reference")
    for _ in range(3):
        actual = select(scores, k, lengths, out=poisoned(scores.shape[:2], k, device), backend="triton")
        assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


@ON_GPU
@DTYPES
def test_every_difficulty_in_long_rows(dtype, device):
    scores = difficult(40000, dtype, device)
    lengths = torch.full((len(scores),), 39999, dtype=torch.int32, device=device)
    result = select(scores, 3000, lengths, out=poisoned(scores.shape[:2], 3000, device), backend="triton")
    assert_selects(result, scores, lengths, 3000, 3000)


@ON_GPU
def test_a_captured_graph_follows_its_inputs(device):
    scores = torch.randn(1, 8, 20000, device=device)
    lengths = torch.tensor([20000], dtype=torch.int32, device=device)
    select(scores, 100, lengths)
    compiled = compiled_kernels()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = select(scores, 100, lengths, backend="triton")
    for length in (20000, 8193, 5000, 3):
        scores.normal_()
        lengths.fill_(length)
        graph.replay()
        assert_selects(result, scores, lengths, 100, 100)
    select(scores[..., :16384].contiguous(), 77, lengths)
    assert compiled_kernels() == compiled, "another k or S compiled another kernel"


def compiled_kernels() -> int:
    return sum(len(cache[0]) for cache in kernel.select_kernel.device_caches.values())
