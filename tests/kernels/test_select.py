"""`select` against a sort of every row in float64: exact, ties and all."""

import pytest
import torch
from compiling import compiled
from select_problem import BOTH, DTYPES, assert_selects, difficult, poisoned, spoil_beyond

from kvcal.kernels.select import select
from kvcal.kernels.select import triton_kernel as kernel


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
def test_k_differs_by_sequence_and_from_the_slots(capacity, small_tiles, backend, device):
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


def test_compiles_for_hopper_without_spilling_and_once_for_all_sizes():
    pytest.importorskip("triton")
    launches = compiled("""
import torch
from kvcal.kernels.select import select
def launch(dtype, tokens, k, capacity):
    scores, lengths = torch.zeros(2, 8, tokens, dtype=dtype), torch.zeros(2, dtype=torch.int32)
    select(scores, k or lengths, lengths, capacity_out=capacity, backend="triton")
launch(torch.float16, 16384, 64, 64)
launch(torch.float16, 4096, 100, 128)
launch(torch.float32, 16384, None, 64)
""")
    assert not any(launch["stack"] for launch in launches), launches
    assert launches[0]["hash"] == launches[1]["hash"]


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
