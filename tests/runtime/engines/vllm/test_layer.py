"""A layer over an engine's pages against stores that have each sequence to themselves: whatever the batches, the pages,
and who had them before."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from methods import CASES
from sequences import TOLERANCES, Geometry, Row, alone, draw, fork, make, prefill
from torch import Tensor

from kvcal.runtime.attention import SoftmaxSpec, causal_attention
from kvcal.runtime.engines.vllm.batch import batch_of
from kvcal.runtime.engines.vllm.engine import heads_of
from kvcal.runtime.engines.vllm.layer import Layer
from kvcal.runtime.kv.pages import PAGE
from kvcal.runtime.methods import METHODS

GEOMETRY = Geometry(32, 32, 2, 3)
SPEC = SoftmaxSpec(GEOMETRY.scaling)
STEPS = 3
FORMS = {
    form: (name, settings)
    for name, case in CASES.items()
    for form, settings in case.forms.items()
    if METHODS[name](**settings).not_paged() is None
}
EVERY = pytest.mark.parametrize("form", FORMS)


@dataclass
class Request:
    row: Row
    pages: list[int] = field(default_factory=list)
    held: int = 0


class Engine:
    """Pages, which are dealt in no order and come back as they were left, and a layer."""

    def __init__(self, method: str, dtype: torch.dtype = torch.float32, spec: SoftmaxSpec = SPEC, **settings: object):
        self.policy = make(method, GEOMETRY, **settings).policy
        self.layer = Layer.of(self.policy, GEOMETRY.kv_heads, GEOMETRY.dim, dtype, spec)
        self.free = torch.randperm(40, generator=torch.Generator().manual_seed(5)).tolist()
        self.pieces = torch.zeros(40, GEOMETRY.kv_heads, self.layer.layout.nbytes, dtype=torch.uint8)

    def soil(self) -> None:
        """Leave in free pages what would be noticed: numbers that are none."""
        self.pieces[self.free] = 255

    def end(self, request: Request) -> None:
        self.free += request.pages
        request.pages, request.held = [], 0

    def step(self, *parts: tuple[Request, int], seen: bool = True) -> list[Tensor]:
        """Outputs [tokens, Hq, D] of each request's next tokens, so many of each; those that decode come first.

        Args:
            seen: whether the host knows how many tokens there are.
        """
        starts, lengths, prefilling, tensors = [0], [], [], []
        for request, count in parts:
            before, after = request.held, request.held + count
            while len(request.pages) * PAGE < after:
                request.pages.append(self.free.pop(0))
            starts.append(starts[-1] + count)
            lengths.append(after)
            prefilling.append(before < request.row.prompt)
            tensors.append([tensor[:, before:after].transpose(0, 1) for tensor in request.row.tensors()])
            request.held = after
        width = max(len(request.pages) for request, _ in parts) + 2
        table = torch.tensor([request.pages + [39] * (width - len(request.pages)) for request, _ in parts])
        slots = torch.cat(
            [
                torch.tensor([request.pages[at // PAGE] * PAGE + at % PAGE for at in range(length - count, length)])
                for (request, count), length in zip(parts, lengths, strict=True)
            ]
        )
        query, key, value = (torch.cat(each) for each in zip(*tensors, strict=True))
        seq_lens = torch.tensor(lengths, dtype=torch.int32)
        batch = batch_of(starts, lengths, prefilling, seq_lens, table.int(), slots, lengths_known=seen)
        output = torch.full_like(query, torch.nan)
        self.layer.forward(query, key, value, self.pieces, batch, output)
        return list(output.split([count for _, count in parts]))


def dense(row: Row, start: int, stop: int, spec: SoftmaxSpec = SPEC) -> Tensor:
    """[tokens, Hq, D] in float64."""
    query, key, value = (tensor.double().unsqueeze(0) for tensor in row.tensors())
    limits = torch.arange(start + 1, stop + 1).unsqueeze(0)
    out = causal_attention(query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop], spec, limits)
    return out[0].transpose(0, 1)


def assert_close(found: Tensor, expected: Tensor, loose: bool = False) -> None:
    """
    Args:
        loose: rows are kept in 8 bits.
    """
    if loose:
        assert (found - expected).norm() < 0.01 * expected.norm()
        return
    torch.testing.assert_close(found.double(), expected.double(), **TOLERANCES[torch.float32])


def coded(form: str) -> bool:
    return FORMS[form][1].get("rows") == 8


@EVERY
def test_requests_come_and_go(form):
    """Prompts in chunks beside others' decoded tokens, pages that are full, and some that others had."""
    method, settings = FORMS[form]
    rows = draw(GEOMETRY, (126, 5, 192, 64), STEPS)
    expected = [alone(method, GEOMETRY, row, SPEC, **settings) for row in rows]
    engine = Engine(method, **settings)
    engine.soil()
    a, b, c, d = (Request(row) for row in rows)

    def check(request: Request, out: Tensor) -> None:
        number = request.held - request.row.prompt - 1
        assert_close(out[0], expected[next(i for i, row in enumerate(rows) if row is request.row)][number].output)

    outs = engine.step((a, 100), (b, 5))
    assert_close(outs[0], dense(a.row, 0, 100), coded(form))
    assert_close(outs[1], dense(b.row, 0, 5), coded(form))
    out_b, rest_a, out_c = engine.step((b, 1), (a, 26), (c, 70))
    check(b, out_b)
    assert_close(rest_a, dense(a.row, 100, 126), coded(form))
    assert_close(out_c, dense(c.row, 0, 70), coded(form))
    out_b, out_a, last_of_chunk = engine.step((b, 1), (a, 1), (c, 1))  # a prompt's single token decodes nothing
    check(b, out_b)
    check(a, out_a)
    assert_close(last_of_chunk, dense(c.row, 70, 71), coded(form))
    out_b, out_a, out_c = engine.step((b, 1), (a, 1), (c, 121))
    check(b, out_b)
    check(a, out_a)
    assert_close(out_c, dense(c.row, 71, 192), coded(form))
    engine.end(b)
    engine.free.sort(reverse=True)
    out_a, out_c, out_d = engine.step((a, 1), (c, 1), (d, 64))
    check(a, out_a)
    check(c, out_c)
    assert_close(out_d, dense(d.row, 0, 64), coded(form))
    for request, out in zip((c, d), engine.step((c, 1), (d, 1)), strict=True):
        check(request, out)


@EVERY
def test_a_prefix_that_another_request_wrote(form):
    """And the same again once it has been preempted, and comes back to other pages."""
    method, settings = FORMS[form]
    (first,) = draw(GEOMETRY, (150,), STEPS)
    second = fork(first, -20, seed=3)  # other tokens from the 130th on
    expected = alone(method, GEOMETRY, second, SPEC, **settings)
    engine = Engine(method, **settings)
    engine.soil()
    one, two = Request(first), Request(second)
    engine.step((one, 140))
    two.pages, two.held = one.pages[:2], 2 * PAGE
    out, _ = engine.step((two, 22), (one, 10))
    assert_close(out, dense(second, 128, 150), coded(form))
    found = [engine.step((two, 1), (one, 1))[0] for _ in range(2)]
    two.pages, two.held = [], 0
    engine.soil()
    engine.step((two, 90))
    engine.step((two, 62))  # the prompt, and the tokens that it had decoded
    found.append(engine.step((two, 1))[0])
    for out, step in zip(found, expected, strict=True):
        assert_close(out[0], step.output)


@EVERY
def test_a_guess_that_is_taken_back(form):
    """Tokens that are verified attend densely; wrong ones are written over, also where they filled a page."""
    method, settings = FORMS[form]
    (row,) = draw(GEOMETRY, (62,), STEPS)
    wrong = fork(row, 1, seed=7)
    expected = alone(method, GEOMETRY, row, SPEC, **settings)
    engine = Engine(method, **settings)
    request = Request(row)
    engine.step((request, 62))
    guessed = Request(wrong, request.pages, request.held)
    out = engine.step((guessed, 3))[0]
    assert_close(out, dense(wrong, 62, 65), coded(form))
    request.pages, request.held = guessed.pages, 63
    for number in (1, 2):
        assert_close(engine.step((request, 1), seen=False)[0][0], expected[number].output)


@pytest.mark.parametrize("method", ["full", "spectral", "quest", "sparq", "loki"])
def test_fixed_shapes_and_padding(method):
    """As a CUDA graph has them: as many requests as there may be, the longest as long as there may be, and some that
    are padding, of no tokens and in page 0."""
    settings = CASES[method].forms[next(iter(CASES[method].forms))]
    rows = draw(GEOMETRY, (126, 5), STEPS)
    expected = [alone(method, GEOMETRY, row, SPEC, **settings)[0] for row in rows]
    engine = Engine(method, **settings)
    engine.free.remove(0)
    requests = [Request(row) for row in rows]
    engine.step((requests[0], 126), (requests[1], 5))
    table, seq_lens = torch.zeros(4, 8, dtype=torch.int32), torch.ones(4, dtype=torch.int32)
    no_slots = torch.full((4,), -1)
    batch = batch_of([0, 1, 2, 3, 4], [1] * 4, [True], seq_lens, table, no_slots, longest=512)
    # What a graph was captured with is changed in place before it is replayed.
    for at, request in enumerate(requests):
        request.pages.append(engine.free.pop())
        table[at, : len(request.pages)] = torch.tensor(request.pages)
    seq_lens.copy_(torch.tensor([127, 6, 0, 0]))
    query, key, value = (torch.zeros(4, heads, GEOMETRY.dim) for heads in (GEOMETRY.heads, 2, 2))
    for at, row in enumerate(rows):
        for batched, own in zip((query, key, value), row.tensors(), strict=True):
            batched[at] = own[:, row.prompt]
    output = torch.full_like(query, torch.nan)
    engine.layer.forward(query, key, value, engine.pieces, batch, output)
    for at, step in enumerate(expected):
        assert_close(output[at], step.output)
    assert not output[2:].isnan().any()


@EVERY
def test_requests_that_decode_stand_anywhere(form):
    """Between prompts, and beside padding of no tokens."""
    method, settings = FORMS[form]
    rows = draw(GEOMETRY, (70, 9, 40), STEPS)
    expected = [alone(method, GEOMETRY, row, SPEC, **settings)[0] for row in rows]
    engine = Engine(method, **settings)
    a, b, c, d = (Request(row) for row in (*rows, rows[2]))
    engine.step((a, 70), (b, 9))
    out_c, out_a, out_d, out_b = engine.step((c, 40), (a, 1), (d, 12), (b, 1))
    assert_close(out_a[0], expected[0].output)
    assert_close(out_b[0], expected[1].output)
    assert_close(out_c, dense(c.row, 0, 40), coded(form))
    assert_close(out_d, dense(d.row, 0, 12), coded(form))
    assert_close(engine.step((c, 1))[0][0], expected[2].output)


def test_warming_up_leaves_nothing():
    engine = Engine("spectral", **CASES["spectral"].forms[next(iter(CASES["spectral"].forms))])
    engine.layer.warm_up(GEOMETRY.heads, 300, torch.device("cpu"))
    assert not engine.pieces.any()
    (row,) = draw(GEOMETRY, (40,), 1)
    request = Request(row)
    assert_close(engine.step((request, 40))[0], dense(row, 0, 40))


def test_soft_capping_and_sink_logits():
    spec = SoftmaxSpec(GEOMETRY.scaling, 5.0, torch.linspace(-1, 2, GEOMETRY.heads))
    (row,) = draw(GEOMETRY, (100,), STEPS)
    for method in ("spectral", "loki", "quest"):
        settings = CASES[method].forms[next(iter(CASES[method].forms))]
        expected = alone(method, GEOMETRY, row, spec, **settings)
        engine, request = Engine(method, spec=spec, **settings), Request(row)
        assert_close(engine.step((request, 100))[0], dense(row, 0, 100, spec))
        for step in expected:
            assert_close(engine.step((request, 1))[0][0], step.output)


@pytest.mark.parametrize("method", ["loki", "quest", "spectral"])
def test_attention_of_prompts_that_the_engine_has(method):
    """It is given queries, and rows as FlashAttention takes them; of rows in 8 bits it is not asked."""
    settings = {"basis": "pca"} if method == "loki" else {}
    (row,) = draw(GEOMETRY, (100,), STEPS)
    calls = []

    def attention(query: Tensor, rows: Tensor, output: Tensor) -> None:
        calls.append(rows)
        key, value = rows[pages].transpose(1, 2).flatten(0, 1)[:100].split(GEOMETRY.dim, -1)
        batched = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
        output.copy_(causal_attention(*batched, SPEC)[0].transpose(0, 1))

    for more in ({}, {"rows": 8}) if method == "spectral" else ({},):
        engine, pages = Engine(method, **settings, **more), [7, 3]
        seq_lens = torch.tensor([100], dtype=torch.int32)
        slots = torch.cat((7 * PAGE + torch.arange(64), 3 * PAGE + torch.arange(36)))
        batch = batch_of([0, 100], [100], [True], seq_lens, torch.tensor([pages]), slots)
        query, key, value = (tensor[:, :100].transpose(0, 1) for tensor in row.tensors())
        output = torch.empty_like(query)
        engine.layer.forward(query, key, value, engine.pieces, batch, output, attention)
        assert_close(output, dense(row, 0, 100), bool(more))
    assert len(calls) == 1


@EVERY
def test_prompts_leave_what_a_store_would(form):
    """Nothing is lost when tokens are written by page: the same bytes are kept of each."""
    method, settings = FORMS[form]
    (row,) = draw(GEOMETRY, (100,), STEPS)
    store = make(method, GEOMETRY, **settings)
    prefill(store, [row], SPEC)
    engine, request = Engine(method, **settings), Request(row)
    engine.step((request, 70))
    engine.step((request, 30))
    parts = engine.layer.layout.parts_of(engine.pieces)
    for name, buffer in store.tokens.items():
        found = parts[name][request.pages].transpose(0, 1).flatten(1, 2)[:, :100]
        torch.testing.assert_close(found.float(), buffer.view[0].float(), rtol=1e-5, atol=1e-5)


@EVERY
def test_workers_that_share_the_heads(form):
    """Each has a KV head, with what was calibrated for it; together they are one worker with all heads."""
    method, settings = FORMS[form]
    (row,) = draw(GEOMETRY, (100,), STEPS)
    expected = alone(method, GEOMETRY, row, SPEC, **settings)
    whole = make(method, GEOMETRY, **settings).policy
    for head in range(GEOMETRY.kv_heads):
        of_head, group = slice(head, head + 1), slice(head * GEOMETRY.group, (head + 1) * GEOMETRY.group)
        engine = Engine(method, **settings)
        engine.layer = Layer.of(whole.on_heads(of_head), 1, GEOMETRY.dim, torch.float32, SPEC)
        engine.pieces = torch.zeros(40, 1, engine.layer.layout.nbytes, dtype=torch.uint8)
        request = Request(Row(row.query[group], row.key[of_head], row.value[of_head], row.prompt))
        engine.step((request, 100))
        for step in expected:
            assert_close(engine.step((request, 1))[0][0], step.output[group])


@pytest.mark.parametrize(
    ("ranks", "total", "expected"),
    [
        (1, 8, [slice(0, 8)]),
        (2, 8, [slice(0, 4), slice(4, 8)]),
        (4, 2, [slice(0, 1), slice(0, 1), slice(1, 2), slice(1, 2)]),
    ],
)
def test_heads_of_workers(ranks, total, expected):
    """As vLLM deals them: its first workers have the first heads, and several the same one where there are too few."""
    assert [heads_of(rank, ranks, total) for rank in range(ranks)] == expected
