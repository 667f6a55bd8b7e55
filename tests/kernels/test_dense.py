"""Dense split-KV decode against one float64 softmax per query."""

import pytest
import torch
from attention_oracle import attention, make, poison, poisoned_empty
from compiling import compiled
from paged_problem import Paged, pages_of
from tolerances import assert_close

from kvcal.kernels.dense import dense
from kvcal.kernels.pages import PAGE
from kvcal.runtime.attention import SoftmaxSpec, probabilities

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="long sequences take a GPU")
BOTH = pytest.mark.parametrize("backend", ["reference", "triton"])
ALL = pytest.mark.parametrize("backend", ["reference", "triton", "numba"])


@pytest.fixture(autouse=True)
def _no_workspace_is_zero(monkeypatch):
    monkeypatch.setattr(torch, "empty", poisoned_empty)


def problem(device, lengths, capacity, heads=2, group=4, width=64, value_width=None, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = make(generator, len(lengths), heads, group, width, dtype=dtype)
    key = make(generator, len(lengths), heads, capacity, width, dtype=dtype)
    value = make(generator, len(lengths), heads, capacity, value_width or width, dtype=dtype)
    lengths = torch.tensor(lengths, dtype=torch.int32)
    held = (torch.arange(capacity) < lengths.unsqueeze(-1)).unsqueeze(1)
    key, value = poison(key, held), poison(value, held)
    by_head = (cache.transpose(0, 1).contiguous().transpose(0, 1) for cache in (key, value))  # as numba takes them
    return tuple(tensor.to(device) for tensor in (query, *by_head, lengths))


def expected(query, key, value, lengths, **logits):
    return attention(query, key, value, lambda sequence, *_: range(int(lengths[sequence])), **logits)


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(
    ("group", "width", "value_width"),
    [(1, 64, 64), (4, 128, 128), (7, 80, 96), (8, 96, 64), (3, 256, 256), (20, 16, 16)],
)
def test_equals_one_softmax_per_query(device, backend, dtype, group, width, value_width):
    operands = problem(device, [70], 90, 1, group, width, value_width, dtype)
    out = dense(*operands, scaling=width**-0.5, backend=backend)
    assert_close(out, expected(*operands, scaling=width**-0.5), dtype)


@BOTH
@pytest.mark.parametrize("splits", [None, 1, 2, 7])
def test_sequences_of_unequal_lengths(device, backend, splits, set_splits):
    set_splits(splits)
    operands = problem(device, [1, 200, 64, 65], 210, heads=1, group=2, width=32)
    out = dense(*operands, scaling=0.125, backend=backend)
    assert_close(out, expected(*operands, scaling=0.125))


@ALL
def test_softcap_and_sinks_are_those_of_the_runtime(device, backend):
    query, key, value, lengths = problem(device, [40, 3], 40)
    sink_logits = torch.tensor([0.0, 3.0, -2.0, 1.0, 5.0, -40.0, 0.5, 2.0], device=device)
    logits = {"scaling": 1.5, "softcap": 4.0, "sink_logits": sink_logits}
    out = dense(query, key, value, lengths, **logits, backend=backend)
    assert_close(out, expected(query, key, value, lengths, **logits))
    visible = torch.arange(40, device=device) < lengths.view(-1, 1, 1, 1)
    weights = probabilities(query.flatten(1, 2).unsqueeze(2), key.nan_to_num(), SoftmaxSpec(**logits), visible)
    assert_close(out, (weights.double() @ value.nan_to_num().double().unsqueeze(2)).squeeze(3), torch.float32)


@BOTH
def test_a_sequence_without_tokens_is_zeros(device, backend):
    query, key, value, lengths = problem(device, [0, 5], 64, width=32)
    sink_logits = torch.zeros(8, device=device)
    for given in (None, sink_logits):
        out = dense(query, key, value, lengths, scaling=1.0, sink_logits=given, backend=backend)
        assert_close(out, expected(query, key, value, lengths, scaling=1.0, sink_logits=given))
        assert not out[0].any()


@BOTH
def test_logits_too_large_for_a_plain_exponential(device, backend):
    query, key, value, lengths = problem(device, [100], 100, heads=1)
    out = dense(query, key, value, lengths, scaling=60.0, backend=backend)
    logits = (key.double() @ query.double().mT).mT * 60
    assert_close(out, logits.softmax(-1) @ value.double(), torch.float16)  # float32 logits of about 2000: ± 1e-4


@BOTH
def test_caches_that_are_views_of_larger_buffers(device, backend):
    query, key, value, lengths = problem(device, [30, 66], 70)
    buffer = torch.full((2, 100, 2, 3 * 64), float("nan"), device=device)
    buffer[:, 20:90, :, 64:128], buffer[:, 20:90, :, 128:] = key.transpose(1, 2), value.transpose(1, 2)
    views = [buffer[:, 20:90, :, part].transpose(1, 2) for part in (slice(64, 128), slice(128, 192))]
    out = torch.full_like(query, float("nan"))
    assert dense(query, *views, lengths, scaling=0.125, out=out, backend=backend) is out
    assert_close(out, expected(query, key, value, lengths, scaling=0.125))


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("width", "value_width"), [(64, 64), (80, 96), (256, 256)])
@pytest.mark.parametrize("layout", [{}, {"heads_first": True, "dtype": torch.int64}], ids=["", "heads first, int64"])
def test_pages_are_attended_as_contiguous_tokens_are(device, backend, dtype, width, value_width, layout):
    out, expected = by_page(device, backend, [0, 130, 64, -1], layout, 1, 3, width, value_width, dtype)
    assert_close(out, expected, dtype)


@ALL
@pytest.mark.parametrize("splits", [None, 1, 2, 7])
def test_pages_of_sequences_of_unequal_lengths(device, backend, splits, set_splits):
    set_splits(splits)
    logits = {"softcap": 4.0, "sink_logits": torch.linspace(-1, 1, 4, device=device)}
    lengths = [1, 5 * PAGE, 0, 65, 2 * PAGE]
    assert_close(*by_page(device, backend, lengths, {}, 2, 2, 32, None, torch.float32, **logits))


def by_page(device, backend, lengths, layout, *shape, **logits):
    """(what dense gives by page, the exact result); contiguous tokens give the same numbers."""
    logits |= {"scaling": 0.125}
    pages = max(-(-length // PAGE) for length in lengths) + 1
    query, key, value, lengths = problem(device, lengths, pages * PAGE, *shape)
    paged = Paged({"key": key, "value": value}, pages_of(lengths, pages), **layout)
    out = dense(query, paged.key, paged.value, lengths, **logits, table=paged.table, backend=backend)
    assert torch.equal(out, dense(query, key, value, lengths, **logits, backend=backend))
    return out, expected(query, key, value, lengths, **logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": torch.ones(2, dtype=torch.int64)}, "lengths: received torch.int64"),
        ({"key": torch.zeros(2, 2, 64, 32)}, r"key: received shape \(2, 2, 64, 32\), expected \[2, 2, capacity, 64\]"),
        ({"value": torch.zeros(2, 2, 63, 64)}, "value: received shape"),
        ({"value": torch.zeros(2, 2, 64, 64, dtype=torch.float16)}, "value: received torch.float16, expected"),
        ({"key": torch.zeros(2, 2, 64, 128)[..., ::2]}, "key: received stride 2"),
        ({"sink_logits": torch.zeros(4)}, r"sink_logits: received torch.float32 \[4\], expected torch.float32 \[8\]"),
        ({"out": torch.zeros(2, 2, 4, 128)[..., ::2]}, "out: received strides"),
        (
            {"table": torch.zeros(2, 4)},
            r"table: received torch.float32 \[2, 4\] on cpu, expected int32 or int64 \[2, P\]",
        ),
        ({"table": torch.zeros(2, 2).int()[:, :0], "key": torch.zeros(2, 2, 63, 64)}, r"expected \[N, 2, 64, 64\]"),
        ({"backend": "fast"}, "backend: received 'fast'"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    names = ("query", "key", "value", "lengths")
    operands = dict(zip(names, problem("cpu", [5, 6], 64), strict=True)) | {"scaling": 1.0, **change}
    with pytest.raises(ValueError, match=message):
        dense(**operands)


def test_capacities_and_batches_share_one_program_that_does_not_spill():
    launches = compiled("""
import torch
from kvcal.kernels.dense import dense
for batch, capacity in ((1, 4096), (1, 5008), (3, 64)):
    cache = torch.zeros(batch, 8, capacity, 128, dtype=torch.bfloat16)
    lengths = torch.ones(batch, dtype=torch.int32)
    dense(cache[:, :, :4], cache, cache, lengths, scaling=0.1, backend="triton")
""")
    assert len({launch["hash"] for launch in launches}) == 2 == len(launches) / 3
    assert not any(launch["stack"] for launch in launches)


def test_tables_of_any_size_share_one_program_that_does_not_spill():
    launches = compiled("""
import torch
from kvcal.kernels.dense import dense
from kvcal.kernels.pages import PageLayout, Part
layout = PageLayout({"key": Part(128, torch.bfloat16), "value": Part(128, torch.bfloat16)})
for batch, count, pages in ((1, 64, 64), (1, 77, 1001), (3, 3, 1)):
    parts = layout.parts_of(torch.zeros(count, 8, layout.nbytes, dtype=torch.uint8))
    table = torch.zeros(batch, pages + 1, dtype=torch.int32)[:, 1:]
    query, lengths = torch.zeros(batch, 8, 4, 128, dtype=torch.bfloat16), torch.ones(batch, dtype=torch.int32)
    dense(query, *parts.values(), lengths, scaling=0.1, table=table, backend="triton")
""")
    assert len({launch["hash"] for launch in launches}) == 2 == len(launches) / 3
    assert not any(launch["stack"] for launch in launches)


@on_a_gpu
@pytest.mark.parametrize("lengths", [[131072], [131072, 1, 1000], [8192] * 3], ids=str)
def test_long_sequences(device, lengths):
    operands = problem(device, lengths, 131072, 2, 4, 128, dtype=torch.bfloat16)
    out = dense(*operands, scaling=0.1)
    assert_close(out, expected(*operands, scaling=0.1), torch.bfloat16)


@on_a_gpu
def test_a_captured_call_follows_lengths_and_contents(device):
    query, key, value, lengths = problem(device, [300, 300], 300, dtype=torch.float16)
    out = torch.empty_like(query)
    dense(query, key, value, lengths, scaling=0.125, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dense(query, key, value, lengths, scaling=0.125, out=out)
    for new in ([1, 300], [299, 7]):
        lengths.copy_(torch.tensor(new, dtype=torch.int32))
        query.normal_()
        graph.replay()
        assert_close(out, expected(query, key, value, lengths, scaling=0.125))


def test_numba_takes_sequences_of_unequal_lengths():
    operands = problem(torch.device("cpu"), [1, 2100, 64, 65], 2110, heads=3, group=2, width=32, value_width=24)
    out = dense(*operands, scaling=0.125, backend="numba")
    assert_close(out, expected(*operands, scaling=0.125))
    apart = torch.nn.functional.pad(operands[1], (0, 1))[..., :-1]
    with pytest.raises(ValueError, match="tokens that lie whole rows apart"):
        dense(operands[0], apart, *operands[2:], scaling=0.125, backend="numba")
