"""The scan in numba and Triton against its definition in float64, and the definition against attention written down."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from compiling import compiled
from scan_problem import PAGE, Problem, by_head, drawn, in_pages
from tolerances import assert_close
from torch import Tensor

from kvcal.kernels.codes import decode
from kvcal.kernels.scan import scan

SCALING = 0.25
LENGTHS = [1500, 70, 3, 64]
FORMS = {
    "4 bits": {},
    "2 bits, the largest logit": {"bits": 2, "select": "max"},
    "8 bits, each query": {"bits": 8, "select": "head", "group": 3},
    "rows of 8 bits": {"rows": 8, "value_dim": 12, "group": 3},
    "rows of 8 bits, each query, soft-capped": {"rows": 8, "select": "head", "softcap": 4.0},
    "bfloat16, sampled": {"dtype": torch.bfloat16, "sample": 64},
    "float16, sampled, sinks": {"dtype": torch.float16, "sample": 100, "group": 1, "sink_logits": True},
    "reduced keys": {"bits": None, "rank": 8, "residual": False},
    "reduced keys in bfloat16": {"bits": None, "dtype": torch.bfloat16, "residual": False, "select": "max", "group": 5},
    "reduced keys in float16": {"bits": None, "dtype": torch.float16, "residual": False, "sample": 64},
    "codewords of float32": {"rounded": False},
    "group of five, wider values": {"group": 5, "value_dim": 24},
    "no residual, everything": {"keep": 1.0, "residual": False, "group": 16},
}
OPTIONS = ("select", "softcap", "residual")
KERNELS = ("numba", "triton")
BACKENDS = pytest.mark.parametrize("backend", [*KERNELS, "reference"])


def problem(form: str, lengths: list[int] = LENGTHS, **more: object) -> tuple[Problem, dict]:
    asked = {**FORMS[form], **more}
    options = {name: asked.pop(name) for name in OPTIONS if name in asked}
    with_sinks = asked.pop("sink_logits", False)
    made = drawn(lengths, **asked)
    if with_sinks:
        options["sink_logits"] = torch.linspace(-1, 3, made.query.shape[1] * made.query.shape[2])
    return made, {"bits": asked.get("bits", 4), "scaling": SCALING, **options}


def in_float64(made: Problem) -> Problem:
    return replace(made, query=made.query.double())


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("form", FORMS)
def test_kernels_are_the_definition(form, backend):
    made, options = problem(form)
    out, read = scan(*made.operands, **options, backend=backend)
    expected, same = scan(*in_float64(made).operands, **options, backend="reference")
    assert torch.equal(read, same)
    if out.dtype == torch.float32:
        torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    else:
        assert_close(out, expected)


@pytest.mark.parametrize("backend", KERNELS)
def test_ends_of_blocks_and_ranges(backend):
    made, options = problem("4 bits", lengths=[2048, 257, 256, 0], capacity=2304)
    out, read = scan(*made.operands, **options, backend=backend)
    expected, same = scan(*in_float64(made).operands, **options, backend="reference")
    assert torch.equal(read, same)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "form", ["4 bits", "8 bits, each query", "rows of 8 bits", "float16, sampled, sinks", "more codewords"]
)
def test_numbers_of_16_bits(form, monkeypatch):
    """As on a GPU, where bits of codes are those of floats. A token whose score is nearly the threshold may be read by
    the one and not by the other."""
    monkeypatch.setattr("kvcal.kernels.scan.triton_launch.kinds", lambda query: (torch.float16, torch.float16))
    made, options = problem("2 bits, the largest logit", codewords=100) if form == "more codewords" else problem(form)
    out, read = scan(*made.operands, **options, backend="triton")
    expected, same = scan(*in_float64(made).operands, **options, backend="reference")
    assert (read != same).float().mean() < 1e-3
    error = (out.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.median() < 2e-3 and error.max() < 0.05


@BACKENDS
@pytest.mark.parametrize("form", FORMS)
def test_pages_in_any_order(form, backend):
    """The same tokens in the pages of an engine, found through a block table, of which the end means nothing."""
    made, options = problem(form)
    tokens, table = in_pages(made.tokens)
    expected, same = scan(*made.operands, **options, backend=backend)
    held = -(-made.budget.lengths // PAGE)
    table = table.masked_fill(torch.arange(table.shape[1]) >= held.unsqueeze(1), 0 if backend == "reference" else 2**30)
    out, read = scan(made.query, tokens, made.tables, made.budget, **options, table=table, backend=backend)
    assert torch.equal(read, same)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", KERNELS)
def test_keys_that_are_their_own_reduced_keys(backend):
    """As Loki's in the basis of principal components: in a page another key's value lies between two keys."""
    made, options = problem("reduced keys")
    made = replace(made, tokens=replace(made.tokens, reduced=made.tokens.key))
    expected, same = scan(*made.operands, **options, backend="reference")
    tokens, table = in_pages(replace(made.tokens, reduced=made.tokens.key))
    tokens = replace(tokens, reduced=tokens.key)
    out, read = scan(made.query, tokens, made.tables, made.budget, **options, table=table, backend=backend)
    assert torch.equal(read, same)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("form", ["4 bits", "rows of 8 bits", "reduced keys"])
def test_what_nobody_wrote_is_not_read(form, backend):
    made, options = problem(form, capacity=2048)
    held = torch.arange(2048) < made.budget.lengths.unsqueeze(1)
    outs = []
    for junk in (0, 7):
        changed = {
            name: part.masked_fill(~held[:, None, :, None], float("nan") if junk and part.is_floating_point() else junk)
            if name not in ("correction", "correction_scale")
            else part
            for name, part in vars(made.tokens).items()
            if isinstance(part, Tensor)
        }
        tokens = type(made.tokens)(**{name: by_head(part) for name, part in changed.items()})
        outs.append(scan(made.query, tokens, made.tables, made.budget, **options, backend=backend))
    assert torch.equal(outs[0][0], outs[1][0]) and torch.equal(outs[0][1], outs[1][1])


def test_the_definition_is_what_readme_says():
    """One sequence and head, token by token in float64."""
    made, options = problem("4 bits", [200], heads=1, group=1)
    out, read = scan(*in_float64(made).operands, **options, backend="reference")
    tokens, tables = made.tokens, made.tables
    query, word = made.query[0, 0, 0].double(), tokens.codeword[0, 0, :200, 0].long()
    code = decode(tokens.reduced[0, 0, :200], tokens.scale[0, 0, :200, 0], 4).double()
    mean = decode(tokens.correction[0, 0], tokens.correction_scale[0, 0, :, 0], 8).double()
    estimated = tables.key[0].double()[word] @ query + code @ (query @ tables.query_map[0].double())
    top, bottom = torch.zeros_like(out[0, 0, 0]), 0.0
    for token in range(200):
        exact = bool(read[0, 0, 0, token])
        logit = query @ tokens.key[0, 0, token].double() if exact else estimated[token]
        value = tokens.value[0, 0, token].double()
        if not exact:
            value = tables.value[0, word[token]].double() + (mean[token // PAGE] if token < 192 else 0)
        top, bottom = top + (logit * SCALING).exp() * value, bottom + (logit * SCALING).exp()
    torch.testing.assert_close(out[0, 0, 0], top / bottom)
    chosen = estimated[1:192].topk(20).indices + 1
    assert read[0, 0, 0].nonzero().flatten().tolist() == sorted({0, *range(192, 200), *chosen.tolist()})


def test_a_sample_reads_about_the_budget():
    """With a rank of r in the sample the share that is read is that of a beta distribution: its deviation is 1/sqrt(r)
    of it. The mean of 16 heads is within three of its own."""
    made, options = problem("4 bits", [16384], heads=16, keep=1 / 32, sample=1024, capacity=16384)
    _, read = scan(*made.operands, **options, backend="numba")
    rank = int(made.budget.rank)
    share = (read.sum(-1).float() - 9) / (16384 / 32)
    assert abs(float(share.mean()) - 1) < 3 / (16 * rank) ** 0.5


@pytest.mark.parametrize("threads", [1, 2])
def test_any_number_of_threads(threads):
    before = torch.get_num_threads()
    import numba

    before_numba = numba.get_num_threads()
    try:
        torch.set_num_threads(threads)
        made, options = problem("4 bits", [5000, 4100])
        out, _ = scan(*made.operands, **options, backend="numba")
        expected, _ = scan(*made.operands, **options, backend="reference")
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert numba.get_num_threads() == before_numba


@BACKENDS
def test_a_token_that_outweighs_the_sample_is_read(backend):
    """Also with a rank of 0, which reads no other candidate: else its weight would overflow."""
    made, options = problem("4 bits", [1500], group=1, sample=64)
    token = 1001  # no multiple of the stride, 23
    code = decode(made.tokens.reduced[0, :, token], made.tokens.scale[0, :, token, 0] * 0 + 1, 4)
    along = torch.einsum("hd,hdr,hr->h", made.query[0, :, 0], made.tables.query_map, code)
    made.tokens.scale[0, :, token, 0] = (1000 / along).half()  # estimates of about 1000
    none = replace(made.budget, rank=torch.zeros_like(made.budget.rank))
    out, read = scan(made.query, made.tokens, made.tables, none, **options, backend=backend)
    assert out.isfinite().all() and read[0, :, 0, token].all()
    assert read.sum(-1).flatten().tolist() == [10, 10], "and the nine that always are"


@BACKENDS
def test_a_group_reads_the_largest_means_of_softmaxes_over_the_sample(backend):
    made, options = problem("reduced keys", [800], heads=1, group=3, sample=100, keep=0.2)
    _, read = scan(*made.operands, **options, backend=backend)
    logits = SCALING * (made.query[0, 0] @ made.tables.query_map[0]) @ made.tokens.reduced[0, 0, :800].T
    sample = torch.arange(8, 792, 8)
    scores = (logits.double().exp() / logits[:, sample].double().exp().sum(1, keepdim=True)).sum(0)
    threshold = scores[sample].sort(descending=True).values[int(made.budget.rank) - 1]
    expected = [0, *(scores[1:792] >= threshold).nonzero().flatten().add(1).tolist(), *range(792, 800)]
    assert read[0, 0, 0].nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("backend", KERNELS)
def test_softmaxes_with_a_sharp_peak(backend):
    """Most scores are too small for float32; what is not read for that has no weight either."""
    made, options = problem("4 bits", [1500, 900])
    out, read = scan(*made.operands, **{**options, "scaling": 20.0}, backend=backend)
    expected, _ = scan(*in_float64(made).operands, **{**options, "scaling": 20.0}, backend="reference")
    assert int(read.sum(-1).max()) <= 160
    torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-3)


def test_a_sequence_without_tokens():
    made, options = problem("4 bits", [300, 4])
    zero = torch.tensor([300, 0])
    empty = replace(made.budget, lengths=zero, first=zero.clamp_max(1), begin=zero.clamp_max(292))
    for backend in (*KERNELS, "reference"):
        out, read = scan(made.query, made.tokens, made.tables, empty, **options, backend=backend)
        assert not out[1].any() and not read[1].any() and read[0].any()


def test_operands_that_do_not_fit_together_are_named():
    made, options = problem("4 bits")
    reduced, of_reduced = problem("reduced keys")
    asked = [
        (made, {**options, "select": "all"}, "select: received 'all'"),
        (made, {**options, "bits": 2}, "reduced: received 8 numbers"),
        (made, {**options, "bits": None}, "expected with bits, and none of them without"),
        (reduced, {**of_reduced, "residual": True}, "received what takes codewords"),
        (replace(made, budget=replace(made.budget, longest=5000)), options, "longest: received 5000"),
        (replace(made, query=made.query[..., :8]), options, "for queries"),
    ]
    for wrong, given, said in asked:
        with pytest.raises(ValueError, match=said):
            scan(*wrong.operands, **given)


def test_what_does_not_fit_is_refused():
    made, options = problem("4 bits")
    apart = replace(made.tokens, key=torch.nn.functional.pad(made.tokens.key, (0, 1))[..., :-1])
    with pytest.raises(ValueError, match="tokens that lie whole rows apart"):
        scan(made.query, apart, made.tables, made.budget, **options, backend="numba")
    with pytest.raises(ValueError, match="expected numbers of at most 32 bits"):
        scan(*in_float64(made).operands, **options, backend="numba")
    out, _ = scan(*in_float64(made).operands, **options)
    assert out.dtype == torch.float64
    wide, of_wide = problem("4 bits", [40], group=17)
    with pytest.raises(ValueError, match="at most 16 queries"):
        scan(*wide.operands, **of_wide, backend="triton")
    much = replace(made.budget, sampled=5000)
    with pytest.raises(ValueError, match="a sample of at most 4096 tokens"):
        scan(made.query, made.tokens, made.tables, much, **options, backend="triton")
    with pytest.raises(ValueError, match="tokens of one order"):
        scan(made.query, apart, made.tables, made.budget, **options, backend="triton")
    tokens, table = in_pages(made.tokens)
    elsewhere = replace(tokens, key=tokens.key.contiguous())
    with pytest.raises(ValueError, match="pages in one piece"):
        scan(made.query, elsewhere, made.tables, made.budget, **options, table=table, backend="triton")
    with pytest.raises(ValueError, match=r"table: received torch.int32 \[3, 24\] on cpu, .* int64 \[4, P\]"):
        scan(made.query, tokens, made.tables, made.budget, **options, table=table[1:])


def test_marks_are_made_for_those_who_ask():
    made, options = problem("4 bits", [300])
    for backend in ("numba", "triton", "reference"):
        assert scan(*made.operands, **options, backend=backend, marked=False)[1] is None


COMPILED = {
    "spectral": {},
    "quarter of 4 bits": {"bits": 4, "rank": 32},
    "rows of 8 bits, 256 dimensions, soft-capped": {"rows": 8, "head_dim": 256, "rank": 128, "softcap": 30.0},
    "each of 16 queries": {"group": 16, "select": "head", "bits": 8, "rank": 32},
    "Loki": {"bits": None, "residual": False, "rank": 32, "group": 8, "head_dim": 64, "select": "max"},
    "Loki, float32": {"bits": None, "residual": False, "rank": 32, "dtype": "float32", "group": 1},
    "by page": {"paged": True},
}


@pytest.mark.parametrize("form", COMPILED)
def test_nothing_is_spilled_and_lengths_compile_nothing_anew(form):
    """For sm_90, of Llama-3-8B's shape but for what is said."""
    asked = {"group": 4, "head_dim": 128, "rank": 64, "bits": 2, "dtype": "bfloat16", **COMPILED[form]}
    options = {name: asked.pop(name) for name in OPTIONS if name in asked}
    asked["dtype"], paged = getattr(torch, asked["dtype"]), asked.pop("paged", False)
    launches = compiled(f"""
import torch
from scan_problem import drawn, in_pages
from kvcal.kernels.scan import scan
for lengths, capacity in (([3000], 3072), ([3100, 9000], 9216)):
    made = drawn(lengths, heads=1, codewords=256, sample=1024, capacity=capacity, **{asked!r})
    tokens, table = in_pages(made.tokens, spare=len(lengths)) if {paged} else (made.tokens, None)
    scan(made.query, tokens, made.tables, made.budget, bits={asked["bits"]}, scaling=0.1, table=table, marked=False,
         backend="triton", **{options!r})
""")
    assert all(launch["stack"] == 0 for launch in launches), launches
    assert all(2 * launch["shared"] <= 227 * 1024 for launch in launches)  # two programs on a multiprocessor
    assert len(launches) == 4 and len({launch["hash"] for launch in launches}) == 2


def test_the_first_kernel_leaves_torch_its_threads():
    script = """
import torch
from scan_problem import drawn
from kvcal.kernels.scan import scan
torch.set_num_threads(1)
scan(*drawn([64]).operands, bits=4, scaling=1.0, backend="numba")
print(torch.get_num_threads())
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "1"
