"""Attention over chosen tokens against one float64 softmax per query."""

import pytest
import torch
from attend_problem import Problem
from attention_oracle import NAN, attention, poisoned_empty
from compiling import compiled
from tolerances import assert_close

from kvcal.kernels.attend import attend

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="long sequences take a GPU")
BOTH = pytest.mark.parametrize("backend", ["reference", "triton"])


@pytest.fixture(autouse=True)
def _no_workspace_is_zero(monkeypatch):
    monkeypatch.setattr(torch, "empty", poisoned_empty)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(
    ("group", "width", "value_width"), [(1, 64, 64), (4, 128, 128), (7, 80, 96), (8, 96, 64), (3, 256, 256)]
)
def test_equals_one_softmax_per_query(device, backend, dtype, group, width, value_width):
    problem = Problem(device, [[70]], 80, 120, group, width, value_width, dtype)
    out = problem.attend(backend, scaling=width**-0.5)
    assert_close(out, problem.expected(scaling=width**-0.5), dtype)


@BOTH
@pytest.mark.parametrize("splits", [None, 1, 2, 5])
def test_counts_of_every_size_at_once(device, backend, splits, set_splits):
    set_splits(splits)
    problem = Problem(device, [[0, 1], [64, 150], [65, 3]], 150, group=2, width=32)
    out = problem.attend(backend, scaling=0.125)
    assert_close(out, problem.expected(scaling=0.125))
    assert not out[0, 0].any()


@BOTH
def test_a_selection_per_query_head(device, backend):
    problem = Problem(device, [[[70, 0, 3, 64], [1, 80, 20, 5]]], 80, width=32)
    sink_logits = torch.linspace(-1, 1, 8, device=device)
    out = problem.attend(backend, scaling=0.125, sink_logits=sink_logits)
    assert_close(out, problem.expected(scaling=0.125, sink_logits=sink_logits))


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_softcap_and_sinks(device, backend, dtype):
    problem = Problem(device, [[0, 30], [70, 5]], 70, width=48, dtype=dtype, value_width=32)
    logits = {"scaling": 0.8, "softcap": 3.0, "sink_logits": torch.linspace(-2, 4, 8, device=device)}
    assert_close(problem.attend(backend, **logits), problem.expected(**logits), dtype)


@BOTH
def test_nothing_chosen_leaves_zeros(device, backend):
    problem = Problem(device, [[0, 0]], 16, width=32)
    assert not problem.attend(backend, scaling=1.0).any()
    assert not problem.attend(backend, scaling=1.0, sink_logits=torch.zeros(8, device=device)).any()


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("width", "value_width"), [(64, 64), (80, 96), (256, 64)])
@pytest.mark.parametrize("layout", [{}, {"heads_first": True, "dtype": torch.int64}], ids=["", "heads first, int64"])
def test_pages_are_attended_as_contiguous_tokens_are(device, backend, dtype, width, value_width, layout):
    problem = Problem(device, [[0, 0], [70, 3], [1, 2]], 80, 256, 3, width, value_width, dtype)
    paged = problem.by_page(**layout)
    assert paged.layout.alternating == (width == value_width) and (paged.table < 0).any()
    out = problem.attend_by_page(backend, paged, scaling=width**-0.5)
    assert torch.equal(out, problem.attend(backend, scaling=width**-0.5))
    assert_close(out, problem.expected(scaling=width**-0.5), dtype)


@BOTH
@pytest.mark.parametrize("splits", [None, 1, 3])
def test_pages_with_a_selection_per_query_head(device, backend, splits, set_splits):
    set_splits(splits)
    problem = Problem(device, [[[70, 0, 3, 64]], [[1, 80, 20, 5]]], 80, 192, width=32)
    logits = {"scaling": 0.8, "softcap": 3.0, "sink_logits": torch.linspace(-1, 1, 4, device=device)}
    out = problem.attend_by_page(backend, problem.by_page(), **logits)
    assert torch.equal(out, problem.attend(backend, **logits))
    assert_close(out, problem.expected(**logits))


def test_more_parts_than_are_merged_at_once(device, monkeypatch, set_splits):
    from kvcal.kernels.attend import merge_kernel

    monkeypatch.setattr(merge_kernel, "PARTS_TILE", 4)
    set_splits(8)
    problem = Problem(device, [[600, 5]], 600, 600, width=16)
    sink_logits = torch.linspace(-1, 1, 8, device=device)
    out = problem.attend("triton", scaling=0.125, sink_logits=sink_logits)
    assert_close(out, problem.expected(scaling=0.125, sink_logits=sink_logits))


@BOTH
def test_a_nan_among_the_chosen_is_not_hidden(device, backend):
    problem = Problem(device, [[5, 5]], 8)
    problem.key[0, 1, problem.index[0, 1, 2]] = NAN
    out = problem.attend(backend, scaling=0.125)
    assert out[0, 1].isnan().all() and not out[0, 0].isnan().any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": torch.zeros(1, 2, 16, dtype=torch.int64)}, "index: received torch.int64"),
        ({"index": torch.zeros(1, 2, 3, 16, dtype=torch.int32)}, r"index: received .*, expected .* \[1, 2, 4, 16\]"),
        ({"count": torch.zeros(1, 2, 4, dtype=torch.int32)}, r"count: received .*, expected torch.int32 \[1, 2\]"),
        ({"sink_logits": torch.zeros(2, 4)}, r"sink_logits: received .* \[2, 4\], expected torch.float32 \[8\]"),
        ({"table": torch.zeros(1, 4).int()}, r"key: received shape \(1, 2, 200, 64\), expected \[N, 2, 64, 64\]"),
        (
            {"table": torch.zeros(2, 4).int()},
            r"table: received torch.int32 \[2, 4\] on cpu, expected .* \[1, P\] on cpu",
        ),
        ({"out": torch.zeros(1, 2, 4, 32)}, r"out: received .*, expected torch.float32 \[1, 2, 4, 64\]"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    problem = Problem("cpu", [[3, 4]], 16)
    names = ("query", "key", "value", "index", "count")
    with pytest.raises(ValueError, match=message):
        attend(**{name: getattr(problem, name) for name in names} | {"scaling": 1.0, **change})


def test_selections_of_any_size_share_one_program_that_does_not_spill():
    launches = compiled("""
import torch
from kvcal.kernels.attend import attend
for capacity, chosen in ((4096, 2048), (5008, 77)):
    cache = torch.zeros(1, 8, capacity, 128, dtype=torch.bfloat16)
    index = torch.zeros(1, 8, chosen, dtype=torch.int32)
    count = index[..., 0].contiguous()
    attend(cache[:, :, :4], cache, cache, index, count, scaling=0.1, backend="triton")
""")
    half = len(launches) // 2
    assert [launch["hash"] for launch in launches[:half]] == [launch["hash"] for launch in launches[half:]]
    assert not any(launch["stack"] for launch in launches)


def test_tables_of_any_size_share_one_program_that_does_not_spill():
    launches = compiled("""
import torch
from kvcal.kernels.attend import attend
from kvcal.kernels.pages import PageLayout, Part
layout = PageLayout({"key": Part(128, torch.bfloat16), "value": Part(128, torch.bfloat16)})
for count, pages, chosen in ((70, 64, 2048), (5, 33, 77)):
    parts = layout.parts_of(torch.zeros(count, 8, layout.nbytes, dtype=torch.uint8))
    table = torch.zeros(1, pages + 1, dtype=torch.int32)[:, 1:]
    index = torch.zeros(1, 8, chosen, dtype=torch.int32)
    query = torch.zeros(1, 8, 4, 128, dtype=torch.bfloat16)
    attend(query, *parts.values(), index, index[..., 0].contiguous(), scaling=0.1, table=table, backend="triton")
""")
    half = len(launches) // 2
    assert [launch["hash"] for launch in launches[:half]] == [launch["hash"] for launch in launches[half:]]
    assert not any(launch["stack"] for launch in launches)


@on_a_gpu
@pytest.mark.parametrize(("batch", "capacity"), [(1, 131072), (8, 16384)])
def test_long_sequences(device, batch, capacity):
    counts = torch.linspace(1, 2048, batch * 2).long().view(batch, 2).tolist()
    problem = Problem(device, counts, 2048, capacity, width=128, dtype=torch.bfloat16)
    out = problem.attend("triton", scaling=0.1)
    assert_close(out, problem.expected(scaling=0.1), torch.bfloat16)


@on_a_gpu
def test_offsets_of_more_than_32_bits(device):
    capacity = 2**24 + 64
    cache = torch.empty(1, 1, capacity, 128, dtype=torch.bfloat16, device=device)
    slots = [0, 77, 2**24 - 1, capacity - 1]
    cache[0, 0, slots] = torch.randn(4, 128, dtype=torch.bfloat16, device=device)
    index = torch.tensor([[slots]], dtype=torch.int32, device=device)
    query = torch.randn(1, 1, 4, 128, dtype=torch.bfloat16, device=device)
    out = attend(query, cache, cache, index, torch.full_like(index[..., 0], 4), scaling=0.1)
    assert_close(out, attention(query, cache, cache, lambda *_: slots, scaling=0.1), torch.bfloat16)


@on_a_gpu
def test_a_captured_step_follows_counts_and_contents(device):
    problem = Problem(device, [[150, 150]], 150, dtype=torch.float16)
    out = torch.empty_like(problem.query)

    def step():
        problem.attend("triton", scaling=0.125, out=out)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for counts in ([[0, 150]], [[64, 1]]):
        problem.count.copy_(torch.tensor(counts, dtype=torch.int32))
        problem.query.normal_()
        graph.replay()
        assert_close(out, problem.expected(scaling=0.125))
