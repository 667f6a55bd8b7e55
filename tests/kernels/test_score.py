"""score against the formula in float64: scaling · (query · entry), softcapped, -inf beyond the length."""

import pytest
import torch
from compiling import compiled
from tolerances import assert_close

from kvcal.kernels.score import score

SCALING = 0.17
INF = torch.inf


def draw(dtype=torch.float32, batch=2, heads=2, group=4, tokens=304, rank=32, device="cpu", seed=0):
    """(query, index)"""
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, heads, group, rank), (batch, heads, tokens, rank)
    query, index = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    return query, index


def expected(query, index, lengths, combine="none", softcap=None):
    logits = SCALING * torch.einsum("bhgr,bhsr->bhgs", query.double().cpu(), index.double().cpu())
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    for row, length in enumerate(lengths):
        logits[row, ..., length:] = -INF
    return logits.amax(2) if combine == "max" else logits


def poisoned(shape, dtype=torch.float32, device="cpu"):
    return torch.full(shape, torch.nan, dtype=dtype, device=device)


def run(query, index, lengths, **options):
    lengths = torch.tensor(lengths, dtype=torch.int32, device=query.device)
    return score(query, index, lengths, scaling=SCALING, **options)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("combine", ["none", "max"])
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
def test_scores_are_the_formulas(device, backend, combine, dtype, group, rank, tokens):
    query, index = draw(dtype, group=group, rank=rank, tokens=tokens, device=device)
    lengths = [tokens, max(1, tokens // 2 - 3)]
    exact = expected(query, index, lengths, combine)
    for row, length in enumerate(lengths):  # what lies beyond a row's length is never used
        index[row, :, length:] = torch.nan
    out = poisoned((2, 2, group, tokens) if combine == "none" else (2, 2, tokens), device=device)
    result = run(query, index, lengths, combine=combine, backend=backend, out=out)
    assert result is out
    assert_close(out, exact)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_softcapped_scores(device, monkeypatch, backend):
    several_blocks_per_program(monkeypatch)
    query, index = draw(device=device)
    lengths = [300, 64]
    out = poisoned((2, 2, 304), torch.float16, device)
    run(query, index, lengths, combine="max", softcap=0.6, block=64, backend=backend, out=out)
    assert_close(out, expected(query, index, lengths, "max", softcap=0.6))


def test_an_index_may_be_a_part_of_larger_tensors(device):
    query, index = draw(torch.float16, tokens=104, device=device)
    wide = torch.zeros(3, 2, 107, 80, dtype=index.dtype, device=device)
    view = wide[1:, :, 2:106, 16:48]
    view.copy_(index)
    wider = torch.zeros(2, 2, 5, 50, dtype=query.dtype, device=device)
    wider[:, :, :4, :32] = query
    out = run(wider[:, :, :4, :32], view, [104, 50], backend="triton")
    assert_close(out, expected(query, index, [104, 50]))


def test_several_blocks_per_program(device, monkeypatch):
    several_blocks_per_program(monkeypatch)
    query, index = draw(tokens=200, device=device)
    out = poisoned((2, 2, 4, 200), device=device)
    run(query, index, [200, 70], block=64, backend="triton", out=out)
    assert_close(out, expected(query, index, [200, 70]))


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_float16_scores_stay_finite(device, backend):
    query, index = draw(tokens=16, device=device)
    out = run(query * 1e6, index, [9, 16], combine="max", out_dtype=torch.float16, backend=backend)
    assert out.dtype == torch.float16
    assert out[0, :, :9].isfinite().all() and (out[0, :, 9:] == -INF).all() and out[1].isfinite().all()
    assert out.max() == torch.finfo(torch.float16).max


def test_scores_are_float32_unless_asked_for_otherwise(device):
    query, index = draw(torch.float16, tokens=8, device=device)
    assert run(query, index, [8, 8]).dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"index": torch.zeros(2, 2, 8, 32).half()}, "index: received torch.float16, expected torch.float32"),
        ({"index": torch.zeros(2, 1, 8, 32)}, r"index: received \[2, 1, 8, 32\], expected \[2, 2, S, 32\]"),
        ({"combine": "sum"}, "combine: received 'sum', expected 'none' or 'max'"),
        ({"scaling": 0.0}, "scaling: received 0.0, expected a positive number"),
        ({"block": 100}, "block: received 100, expected a power of two from 64"),
        ({"query": torch.zeros(2, 2, 4, 30)}, r"index: received \[2, 2, 8, 32\], expected \[2, 2, S, 30\]"),
        ({"query": torch.zeros(2, 2, 4, 32).double()}, "query: received torch.float64"),
        ({"lengths": torch.tensor([8, 8])}, "lengths: received torch.int64"),
        ({"out": torch.zeros(2, 2, 8)}, r"out: received torch.float32 \[2, 2, 8\]"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    query, index = draw(tokens=8)
    lengths = torch.tensor([8, 8], dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        score(**{"query": query, "index": index, "lengths": lengths, "scaling": 1.0} | changes)


def test_compiles_for_hopper_without_spilling_and_once_for_all_capacities():
    pytest.importorskip("triton")
    launches = compiled("""
import torch
from kvcal.kernels.score import score
def launch(rank, tokens, dtype, **options):
    query, index = torch.zeros(1, 8, 4, rank, dtype=dtype), torch.zeros(1, 8, tokens, rank, dtype=dtype)
    score(query, index, torch.ones(1, dtype=torch.int32), scaling=0.1, backend="triton", **options)
for tokens in (8, 1000, 4096):
    launch(32, tokens, torch.bfloat16, combine="max", out_dtype=torch.float16)
launch(32, 4096, torch.float16, softcap=30.0)
launch(128, 4096, torch.bfloat16, combine="max")
""")
    assert all(launch["stack"] == 0 and launch["shared"] <= 56 * 1024 for launch in launches), launches
    assert len({launch["hash"] for launch in launches[:3]}) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_long_rows_replayed_from_a_cuda_graph(device):
    query, index = draw(torch.bfloat16, tokens=40000, device=device)
    lengths = torch.tensor([40000, 1], dtype=torch.int32, device=device)
    out = poisoned((2, 2, 40000), device=device)

    def step():
        score(query, index, lengths, scaling=SCALING, combine="max", out=out)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for now in ([40000, 1], [123, 39999]):
        lengths.copy_(torch.tensor(now))
        out.fill_(torch.nan)
        graph.replay()
        assert_close(out, expected(query, index, now, "max"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="long rows take a GPU")
@pytest.mark.parametrize("combine", ["none", "max"])
@pytest.mark.parametrize("rank", [32, 128])
def test_rows_of_131072(device, rank, combine):
    query, index = draw(torch.bfloat16, tokens=131072, rank=rank, device=device)
    lengths = [131072, 100003]
    out = poisoned((2, 2, 4, 131072) if combine == "none" else (2, 2, 131072), device=device)
    run(query, index, lengths, combine=combine, out=out)
    assert_close(out, expected(query, index, lengths, combine))


def several_blocks_per_program(monkeypatch):
    from kvcal.kernels.score import triton_kernel

    monkeypatch.setattr(triton_kernel, "PROGRAMS", 1)
