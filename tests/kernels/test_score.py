"""score against the formula in float64: scaling · (query · key), softcapped, -inf beyond the length."""

import pytest
import torch
from compiling import compiled
from paged_problem import Paged, pages_of
from tolerances import assert_close

from kvcal.kernels.pages import PAGE
from kvcal.kernels.score import score

SCALING = 0.17
INF = torch.inf


def draw(dtype=torch.float32, batch=2, heads=2, group=4, tokens=304, rank=32, device="cpu", seed=0):
    """(query, key)"""
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, heads, group, rank), (batch, heads, tokens, rank)
    query, key = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    return query, key


def expected(query, key, lengths, softcap=None):
    logits = SCALING * torch.einsum("bhgr,bhsr->bhgs", query.double().cpu(), key.double().cpu())
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    for sequence, length in enumerate(lengths):
        logits[sequence, ..., length:] = -INF
    return logits


def poisoned(*shape, device="cpu"):
    return torch.full(shape, torch.nan, device=device)


def run(query, key, lengths, **options):
    lengths = torch.tensor(lengths, dtype=torch.int32, device=query.device)
    return score(query, key, lengths, scaling=SCALING, **options)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(
    ("dtype", "group", "rank", "tokens"),
    [
        (torch.float32, 4, 32, 304),
        (torch.float16, 1, 16, 257),
        (torch.bfloat16, 7, 48, 128),
        (torch.float16, 8, 64, 63),
        (torch.bfloat16, 16, 24, 8),
        (torch.float32, 3, 128, 1),
    ],
)
def test_scores_are_the_formulas(device, backend, dtype, group, rank, tokens):
    query, key = draw(dtype, group=group, rank=rank, tokens=tokens, device=device)
    lengths = [tokens, max(1, tokens // 2 - 3)]
    exact = expected(query, key, lengths)
    for sequence, length in enumerate(lengths):  # what lies beyond a sequence's length is never used
        key[sequence, :, length:] = torch.nan
    out = poisoned(2, 2, group, tokens, device=device)
    result = run(query, key, lengths, backend=backend, out=out)
    assert result is out
    assert_close(out, exact)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_softcapped_scores(device, monkeypatch, backend):
    several_blocks_per_program(monkeypatch)
    query, key = draw(device=device)
    lengths = [300, 64]
    out = poisoned(2, 2, 4, 304, device=device)
    run(query, key, lengths, softcap=0.6, block=64, backend=backend, out=out)
    assert_close(out, expected(query, key, lengths, softcap=0.6))


def test_keys_may_be_a_part_of_larger_tensors(device):
    query, key = draw(torch.float16, tokens=104, device=device)
    wide = torch.zeros(3, 2, 107, 80, dtype=key.dtype, device=device)
    view = wide[1:, :, 2:106, 16:48]
    view.copy_(key)
    wider = torch.zeros(2, 2, 5, 50, dtype=query.dtype, device=device)
    wider[:, :, :4, :32] = query
    out = run(wider[:, :, :4, :32], view, [104, 50], backend="triton")
    assert_close(out, expected(query, key, [104, 50]))


def test_several_blocks_per_program(device, monkeypatch):
    several_blocks_per_program(monkeypatch)
    query, key = draw(tokens=200, device=device)
    out = poisoned(2, 2, 4, 200, device=device)
    run(query, key, [200, 70], block=64, backend="triton", out=out)
    assert_close(out, expected(query, key, [200, 70]))


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("width", "value_width", "rank"), [(32, 32, 32), (80, 80, 48), (64, 96, 24)])
@pytest.mark.parametrize("layout", [{}, {"heads_first": True, "dtype": torch.int64}], ids=["", "heads first, int64"])
def test_pages_are_scored_as_contiguous_tokens_are(
    device, monkeypatch, backend, dtype, width, value_width, rank, layout
):
    """Keys by themselves, and the first of their dimensions, beside values that are as wide or not."""
    several_blocks_per_program(monkeypatch)
    lengths, pages = [130, 0, PAGE, 4 * PAGE, -1, 1], 5
    query, key = draw(dtype, len(lengths), 2, 3, pages * PAGE, width, device)
    for sequence, length in enumerate(lengths):
        key[sequence, :, max(length, 0) :] = torch.nan
    caches = {"key": key, "value": key.new_zeros(*key.shape[:3], value_width), "reduced": key[..., :rank]}
    paged = Paged(caches, pages_of(lengths, pages), **layout)
    query, exact = query[..., :rank], key.nan_to_num()[..., :rank]
    for part in (paged.key[..., :rank], paged.parts["reduced"]):
        out = poisoned(len(lengths), 2, 3, pages * PAGE, device=device)
        run(query, part, lengths, softcap=3.0, table=paged.table, backend=backend, out=out)
        assert_close(out, expected(query, exact, [max(length, 0) for length in lengths], softcap=3.0))
        assert_close(out, run(query, key[..., :rank], lengths, softcap=3.0, backend=backend))
    alone = run(query, part, lengths, table=paged.table, backend=backend)
    assert alone.shape == out.shape and torch.equal(alone.isinf(), out.isinf())


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_products_that_overflow_are_clamped_by_the_kernel(device):
    query, key = draw(tokens=16, device=device)
    query[..., 1:] = 0  # no difference of infinities, which is NaN
    out = run(query * 1e25, key * 1e25, [9, 16], backend="triton")
    exact = expected(query, key, [9, 16])
    assert torch.equal(out.cpu(), exact.sign().mul(torch.finfo(out.dtype).max).where(exact.isfinite(), -INF).float())


def test_scores_are_float32(device):
    query, key = draw(torch.float16, tokens=8, device=device)
    assert run(query, key, [8, 8]).dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": torch.zeros(2, 2, 8, 32).half()}, "key: received torch.float16, expected torch.float32"),
        ({"key": torch.zeros(2, 1, 8, 32)}, r"key: received \[2, 1, 8, 32\], expected \[2, 2, S, 32\]"),
        ({"scaling": 0.0}, "scaling: received 0.0, expected a positive number"),
        ({"block": 100}, "block: received 100, expected a power of two from 64"),
        ({"query": torch.zeros(2, 2, 4, 30)}, r"key: received \[2, 2, 8, 32\], expected \[2, 2, S, 30\]"),
        ({"query": torch.zeros(2, 2, 4, 32).double()}, "query: received torch.float64"),
        ({"lengths": torch.tensor([8, 8])}, "lengths: received torch.int64"),
        ({"out": torch.zeros(2, 2, 8)}, r"out: received torch.float32 \[2, 2, 8\] on cpu, expected contiguous"),
        ({"table": torch.zeros(2, 1).int()}, r"key: received \[2, 2, 8, 32\], expected \[N, 2, 64, 32\]"),
        ({"table": torch.zeros(2, 1).short()}, r"table: received torch.int16 \[2, 1\] on cpu, expected int32 or int64"),
        ({"out": torch.zeros(2, 2, 4, 8).half()}, r"out: received torch.float16 \[2, 2, 4, 8\]"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    query, key = draw(tokens=8)
    lengths = torch.tensor([8, 8], dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        score(**{"query": query, "key": key, "lengths": lengths, "scaling": 1.0} | changes)


def test_compiles_for_hopper_without_spilling_and_once_for_all_capacities():
    pytest.importorskip("triton")
    launches = compiled("""
import torch
from kvcal.kernels.score import score
def launch(rank, tokens, dtype, **options):
    query, key = torch.zeros(1, 8, 4, rank, dtype=dtype), torch.zeros(1, 8, tokens, rank, dtype=dtype)
    score(query, key, torch.ones(1, dtype=torch.int32), scaling=0.1, backend="triton", **options)
for tokens in (8, 1000, 4096):
    launch(32, tokens, torch.bfloat16)
launch(32, 4096, torch.float16, softcap=30.0)
launch(128, 4096, torch.bfloat16)
""")
    assert all(launch["stack"] == 0 and launch["shared"] <= 56 * 1024 for launch in launches), launches
    assert len({launch["hash"] for launch in launches[:3]}) == 1


def test_by_page_compiles_for_hopper_without_spilling_and_once_for_all_tables():
    pytest.importorskip("triton")
    launches = compiled("""
import torch
from kvcal.kernels.pages import PageLayout, Part
from kvcal.kernels.score import score
def launch(name, count, pages, dtype, **options):
    layout = PageLayout({"key": Part(128, dtype), "value": Part(128, dtype), "reduced": Part(32, dtype)})
    key = layout.parts_of(torch.zeros(count, 8, layout.nbytes, dtype=torch.uint8))[name]
    table = torch.zeros(1, pages + 1, dtype=torch.int32)[:, 1:]
    query, lengths = torch.zeros(1, 8, 4, key.shape[3], dtype=dtype), torch.ones(1, dtype=torch.int32)
    score(query, key, lengths, scaling=0.1, table=table, backend="triton", **options)
for count, pages in ((1, 1), (50, 16), (77, 1001)):
    launch("reduced", count, pages, torch.bfloat16)
launch("reduced", 9, 64, torch.float16, softcap=30.0)
launch("key", 9, 64, torch.bfloat16)
""")
    assert all(launch["stack"] == 0 and launch["shared"] <= 56 * 1024 for launch in launches), launches
    assert len({launch["hash"] for launch in launches[:3]}) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_long_sequences_replayed_from_a_cuda_graph(device):
    query, key = draw(torch.bfloat16, tokens=40000, device=device)
    lengths = torch.tensor([40000, 1], dtype=torch.int32, device=device)
    out = poisoned(2, 2, 4, 40000, device=device)

    def step():
        score(query, key, lengths, scaling=SCALING, out=out)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for now in ([40000, 1], [123, 39999]):
        lengths.copy_(torch.tensor(now))
        out.fill_(torch.nan)
        graph.replay()
        assert_close(out, expected(query, key, now))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="long sequences take a GPU")
@pytest.mark.parametrize("rank", [32, 128])
def test_sequences_of_131072(device, rank):
    query, key = draw(torch.bfloat16, tokens=131072, rank=rank, device=device)
    lengths = [131072, 100003]
    out = poisoned(2, 2, 4, 131072, device=device)
    run(query, key, lengths, out=out)
    assert_close(out, expected(query, key, lengths))


def several_blocks_per_program(monkeypatch):
    from kvcal.kernels.score import triton_kernel

    monkeypatch.setattr(triton_kernel, "PROGRAMS", 1)
