"""score against the formula in float64: scaling · scale · (query · code), softcapped, -inf beyond the length."""

import pytest
import torch
from compiling import compiled
from tolerances import assert_close

from kvcal.kernels.score import block_of, score

SCALING = 0.17
INF = torch.inf


def draw(bits, dtype=torch.float32, batch=2, heads=2, group=4, tokens=304, rank=32, device="cpu", seed=0):
    """(query, codes, scales, float64 keys [B, Hkv, S, r] that the codes stand for)."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, group, rank, generator=generator).to(dtype)
    if bits == 16:
        codes = torch.randn(batch, heads, tokens, rank, generator=generator).to(dtype)
        return query.to(device), codes.to(device), None, codes.double()
    least, steps = {8: (-127, 255), 4: (-7, 15), 2: (-1.5, 4)}[bits]
    levels = torch.randint(steps, (batch, heads, tokens, rank), generator=generator) + least
    scales = (torch.rand(batch, heads, tokens, generator=generator) + 0.5).div(-least).half()
    keys = levels.double() * scales.double().unsqueeze(-1)
    if bits == 8:
        codes = levels.to(torch.int8)
    else:
        quarter, zero = rank * bits // 8, {4: 8, 2: 1.5}[bits]
        fields = [
            (levels[..., part * quarter :][..., :quarter] + zero) * 2 ** (part * bits) for part in range(8 // bits)
        ]
        codes = sum(fields).to(torch.uint8)
    return query.to(device), codes.to(device), scales.to(device), keys


def expected(query, keys, lengths, combine="none", softcap=None):
    logits = SCALING * torch.einsum("bhgr,bhsr->bhgs", query.double().cpu(), keys)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    for row, length in enumerate(lengths):
        logits[row, ..., length:] = -INF
    return logits.amax(2) if combine == "max" else logits


def poisoned(shape, dtype=torch.float32, device="cpu"):
    return torch.full(shape, torch.nan, dtype=dtype, device=device)


def run(query, codes, scales, lengths, **options):
    lengths = torch.tensor(lengths, dtype=torch.int32, device=query.device)
    return score(query, codes, scales, lengths, scaling=SCALING, **options)


def precision(bits):
    """Beside integer codes the kernel rounds the queries to float16."""
    return torch.float32 if bits == 16 else torch.float16


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("combine", ["none", "max"])
@pytest.mark.parametrize("bits", [16, 8, 4, 2])
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
def test_scores_are_the_formulas(device, backend, combine, bits, dtype, group, rank, tokens):
    query, codes, scales, keys = draw(bits, dtype, group=group, rank=rank, tokens=tokens, device=device)
    lengths = [tokens, max(1, tokens // 2 - 3)]
    for row, length in enumerate(lengths):  # what lies beyond a row's length is never used
        if bits == 16:
            codes[row, :, length:] = torch.nan
        else:
            scales[row, :, length:] = torch.nan
    out = poisoned((2, 2, group, tokens) if combine == "none" else (2, 2, tokens), device=device)
    result = run(query, codes, scales, lengths, bits=bits, combine=combine, backend=backend, out=out)
    assert result is out
    assert_close(out, expected(query, keys, lengths, combine), precision(bits))


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("bits", [16, 8, 4, 2])
def test_softcapped_scores(device, monkeypatch, backend, bits):
    several_blocks_per_program(monkeypatch)
    query, codes, scales, keys = draw(bits, device=device)
    lengths = [300, 64]
    out = poisoned((2, 2, 304), torch.float16, device)
    run(
        query, codes, scales, lengths, bits=bits, combine="max", softcap=0.6, block=64,
        backend=backend, out=out,
    )  # fmt: skip
    assert_close(out, expected(query, keys, lengths, "max", softcap=0.6))


@pytest.mark.parametrize("bits", [16, 8, 4, 2])
def test_an_index_may_be_a_part_of_larger_tensors(device, bits):
    query, codes, scales, keys = draw(bits, torch.float16, tokens=104, device=device)
    wide = torch.zeros(3, 2, 107, 80, dtype=codes.dtype, device=device)
    view = wide[1:, :, 2:106, 16 : 16 + codes.shape[-1]]
    view.copy_(codes)
    if scales is not None:
        holder = poisoned((3, 2, 107), torch.float16, device)
        holder[1:, :, 2:106] = scales
        scales = holder[1:, :, 2:106]
    wider = torch.zeros(2, 2, 5, 50, dtype=query.dtype, device=device)
    wider[:, :, :4, :32] = query
    out = run(wider[:, :, :4, :32], view, scales, [104, 50], bits=bits, backend="triton")
    assert_close(out, expected(query, keys, [104, 50]), precision(bits))


@pytest.mark.parametrize("bits", [16, 8, 4, 2])
def test_several_blocks_per_program(device, monkeypatch, bits):
    several_blocks_per_program(monkeypatch)
    query, codes, scales, keys = draw(bits, tokens=200, device=device)
    out = poisoned((2, 2, 4, 200), device=device)
    run(query, codes, scales, [200, 70], bits=bits, block=64, backend="triton", out=out)
    assert_close(out, expected(query, keys, [200, 70]), precision(bits))


@pytest.mark.parametrize("factor", [1e-20, 0.0, 1e20])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_float16_holds_queries_of_any_size(device, bits, factor):
    query, codes, scales, keys = draw(bits, tokens=40, device=device)
    out = run(query * factor, codes, scales, [40, 40], bits=bits, backend="triton")
    assert_close(out / (factor or 1.0), expected(query, keys, [40, 40]) * (factor > 0), torch.float16)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_float16_scores_stay_finite(device, backend):
    query, codes, scales, _ = draw(16, tokens=16, device=device)
    out = run(query * 1e6, codes, scales, [9, 16], combine="max", out_dtype=torch.float16, backend=backend)
    assert out.dtype == torch.float16
    assert out[0, :, :9].isfinite().all() and (out[0, :, 9:] == -INF).all() and out[1].isfinite().all()
    assert out.max() == torch.finfo(torch.float16).max


def test_dense_out_dtype_and_block_defaults(device):
    query, codes, scales, _ = draw(4, tokens=8, device=device)
    assert run(query, codes, scales, [8, 8], bits=4).dtype == torch.float32
    assert [block_of(bits) for bits in (16, 8, 4, 2)] == [128, 256, 256, 256]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 5}, "bits: received 5, expected 16, 8, 4 or 2"),
        ({"bits": 8}, "codes: received torch.uint8, expected torch.int8 for 8 bits"),
        ({"bits": 16}, "codes: received torch.uint8, expected torch.float32 for 16 bits"),
        ({"bits": 2}, r"codes: received \[2, 2, 8, 16\], expected \[2, 2, S, …\] of rank 32"),
        ({"combine": "sum"}, "combine: received 'sum', expected 'none' or 'max'"),
        ({"scaling": 0.0}, "scaling: received 0.0, expected a positive number"),
        ({"block": 100}, "block: received 100, expected a power of two from 64"),
        ({"scales": None}, "scales: received none with 4 bits"),
        ({"scales": torch.zeros(2, 2, 8)}, "scales: received torch.float32"),
        ({"query": torch.zeros(2, 2, 4, 30)}, r"codes: received \[2, 2, 8, 16\], expected .* of rank 30"),
        ({"query": torch.zeros(2, 2, 4, 32).double()}, "query: received torch.float64"),
        ({"lengths": torch.tensor([8, 8])}, "lengths: received torch.int64"),
        ({"out": torch.zeros(2, 2, 8)}, r"out: received torch.float32 \[2, 2, 8\]"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    query, codes, scales, _ = draw(4, tokens=8)
    lengths = torch.tensor([8, 8], dtype=torch.int32)
    arguments = {"query": query, "codes": codes, "scales": scales, "lengths": lengths, "scaling": 1.0, "bits": 4}
    with pytest.raises(ValueError, match=message):
        score(**arguments | changes)


def test_compiles_for_hopper_without_spilling_and_once_for_all_capacities():
    pytest.importorskip("triton")
    launches = compiled("""
import torch
from kvcal.kernels.score import score
def launch(bits, rank, tokens, dtype, **options):
    codes = {16: (rank, dtype), 8: (rank, torch.int8)}.get(bits, (rank * bits // 8, torch.uint8))
    codes = torch.zeros(1, 8, tokens, codes[0], dtype=codes[1])
    scales = None if bits == 16 else torch.zeros(1, 8, tokens, dtype=torch.float16)
    query, lengths = torch.zeros(1, 8, 4, rank, dtype=dtype), torch.ones(1, dtype=torch.int32)
    score(query, codes, scales, lengths, scaling=0.1, bits=bits, backend="triton", **options)
for tokens in (8, 1000, 4096):
    launch(4, 32, tokens, torch.bfloat16, combine="max", out_dtype=torch.float16)
for tokens in (8, 1000, 4096):
    launch(2, 64, tokens, torch.bfloat16, combine="max", out_dtype=torch.float16)
launch(2, 32, 4096, torch.bfloat16, combine="max", out_dtype=torch.float16)
launch(8, 32, 4096, torch.float16, softcap=30.0)
launch(16, 128, 4096, torch.bfloat16, combine="max")
""")
    assert all(launch["stack"] == 0 and launch["shared"] <= 56 * 1024 for launch in launches), launches
    assert len({launch["hash"] for launch in launches[:3]}) == len({launch["hash"] for launch in launches[3:6]}) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("bits", [16, 8, 4, 2])
def test_long_rows_replayed_from_a_cuda_graph(device, bits):
    query, codes, scales, keys = draw(bits, torch.bfloat16, tokens=40000, device=device)
    lengths = torch.tensor([40000, 1], dtype=torch.int32, device=device)
    out = poisoned((2, 2, 40000), device=device)

    def step():
        score(query, codes, scales, lengths, scaling=SCALING, bits=bits, combine="max", out=out)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for now in ([40000, 1], [123, 39999]):
        lengths.copy_(torch.tensor(now))
        out.fill_(torch.nan)
        graph.replay()
        assert_close(out, expected(query, keys, now, "max"), precision(bits))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="long rows take a GPU")
@pytest.mark.parametrize("combine", ["none", "max"])
@pytest.mark.parametrize(("bits", "rank"), [(16, 128), (8, 32), (4, 32), (2, 32), (2, 64)])
def test_rows_of_131072(device, bits, rank, combine):
    query, codes, scales, keys = draw(bits, torch.bfloat16, tokens=131072, rank=rank, device=device)
    lengths = [131072, 100003]
    out = poisoned((2, 2, 4, 131072) if combine == "none" else (2, 2, 131072), device=device)
    run(query, codes, scales, lengths, bits=bits, combine=combine, out=out)
    assert_close(out, expected(query, keys, lengths, combine), precision(bits))


def several_blocks_per_program(monkeypatch):
    from kvcal.kernels.score import triton_kernel

    monkeypatch.setattr(triton_kernel, "PROGRAMS", 1)
