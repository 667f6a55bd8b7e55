"""`spectral` over a calibrated codebook, against its formula written down in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracle_codebook import Sequence, step
from samples import artifact
from sequences import TOLERANCES
from torch import Tensor

from kvcal.calibrate.codebook_stage import codebook
from kvcal.kernels import backend
from kvcal.runtime.attention import SoftmaxSpec, attention
from kvcal.runtime.methods.spectral import Spectral
from kvcal.runtime.store import Store

HEADS, GROUP, D, DV = 2, 2, 16, 12
LENGTHS = (150, 70, 3, 64)
"""A sequence of two full pages and an open one, one that has just begun its second, one that is shorter than anything,
and one whose last token fills its page."""
SPEC = SoftmaxSpec(D**-0.5)
CAPPED = SoftmaxSpec(D**-0.5, softcap=4.0, sink_logits=torch.linspace(-1, 1, HEADS * GROUP))
SMALL = {"keep": 0.2, "rank": 16, "sinks": 2, "recent": 4, "choice": "exact"}
FORMS = {
    "group": {},
    "largest logit": {"select": "max", "bits": 4},
    "each head": {"select": "head", "bits": 8},
    "rows of 8 bits": {"rows": 8},
    "rows of 8 bits, each head": {"rows": 8, "select": "head", "sinks": 0},
    "no residual": {"residual": False},
    "a count": {"keep": 20, "recent": 1},
    "short ones whole": {"dense_below": 100},
}


@pytest.fixture(scope="module")
def fitted():
    return codebook(artifact(head_dim=D, value_dim=DV, tokens=96), codewords=6)


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows(lengths=LENGTHS, seed: int = 0) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(query, key, value) of each sequence: [H, n, D | Dv]."""
    return [
        (drawn(HEADS * GROUP, n, D, seed=seed + 3 * at), drawn(HEADS, n, D, seed=seed + 3 * at + 1) * 1.5,
         drawn(HEADS, n, DV, seed=seed + 3 * at + 2))
        for at, n in enumerate(lengths)
    ]  # fmt: skip


def prefilled(store: Store, sequences: list[tuple[Tensor, Tensor, Tensor]], spec: SoftmaxSpec) -> None:
    """All tokens but the last of each sequence, padded on the left."""
    longest = max(query.shape[1] for query, _, _ in sequences) - 1
    padded = [of.new_zeros(len(sequences), of.shape[0], longest, of.shape[2]) for of in sequences[0]]
    valid = torch.zeros(len(sequences), longest, dtype=torch.bool)
    for at, row in enumerate(sequences):
        count = row[0].shape[1] - 1
        valid[at, longest - count :] = True
        for into, of in zip(padded, row, strict=True):
            into[at, :, longest - count :] = of[:, :count]
    store.prefill(*padded, spec, None if bool(valid.all()) else valid)


def stepped(store: Store, sequences: list[tuple[Tensor, Tensor, Tensor]], spec: SoftmaxSpec) -> Tensor:
    """[B, Hq, Dv] of the last tokens."""
    query, key, value = (torch.stack([row[of][:, -1:] for row in sequences]) for of in range(3))
    store.append(key, value)
    return store.attend(query, spec).squeeze(2)


@pytest.fixture(params=[True, False], ids=["numba", "torch"])
def numba(request, monkeypatch):
    """Whether a kernel in numba takes the step, or torch."""
    if not request.param:
        monkeypatch.setattr(backend, "has_numba", lambda: False)
    return request.param


@pytest.mark.parametrize("spec", [SPEC, CAPPED], ids=["plain", "soft-capped with sink logits"])
@pytest.mark.parametrize("form", FORMS)
def test_a_step_is_the_formula(fitted, form, spec, numba):
    policy = Spectral(**{**SMALL, **FORMS[form]}).bind(1, D, fitted)
    store, sequences = Store(policy), rows()
    prefilled(store, sequences, spec)
    out, mask = stepped(store, sequences, spec), store.read_mask()
    mask = mask.repeat_interleave(HEADS * GROUP // mask.shape[1], 1)
    for at, (query, key, value) in enumerate(sequences):
        expected, read = step(policy, Sequence.of(policy, key, value), query[:, -1], spec)
        # Corrections are kept in 8 bits.
        torch.testing.assert_close(out[at].double(), expected, rtol=1e-4, atol=2e-3)
        assert [set(head.nonzero().flatten().tolist()) for head in mask[at]] == read


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["group", "each head", "rows of 8 bits"])
def test_other_dtypes(fitted, form, dtype):
    """Numbers that 16 bits hold, too, so that a step in float32 has the same to choose from."""
    policy = Spectral(**{**SMALL, **FORMS[form]}).bind(1, D, fitted)
    outs = []
    sequences = [tuple(of.bfloat16().half().float() for of in row) for row in rows()]
    for of_dtype in (torch.float32, dtype):
        store, given = Store(policy), [tuple(of.to(of_dtype) for of in row) for row in sequences]
        prefilled(store, given, SPEC)
        outs.append((stepped(store, given, SPEC), store.read_mask(), store.bytes_read()))
    (expected, read, _), (out, same, count) = outs
    assert out.dtype == dtype and torch.equal(read, same) and count > 0
    torch.testing.assert_close(out.float(), expected, **TOLERANCES[dtype])


@pytest.mark.parametrize("rows_of", [16, 8])
def test_all_tokens_are_full_attention(fitted, rows_of):
    policy = Spectral(**{**SMALL, "keep": 1.0, "rows": rows_of}).bind(0, D, fitted)
    store, sequences = Store(policy), rows()
    prefilled(store, sequences, SPEC)
    out = stepped(store, sequences, SPEC)
    for at, (query, key, value) in enumerate(sequences):
        kept = Sequence.of(policy, key, value)
        dense = attention(query[None, :, -1:].double(), kept.key[None], kept.value[None], SPEC)[0, :, 0]
        torch.testing.assert_close(out[at].double(), dense, rtol=1e-4, atol=1e-5)
        if rows_of == 8:
            exact = attention(query[None, :, -1:], key[None], value[None], SPEC)[0, :, 0]
            assert float((out[at] - exact).norm() / exact.norm()) < 0.02, "of 8 bits"


@pytest.mark.parametrize("form", ["group", "rows of 8 bits"])
def test_however_tokens_came(fitted, form):
    """At once, in chunks, one by one, taken back and come again, and as a chosen sequence of another batch."""
    policy = Spectral(**{**SMALL, **FORMS[form]}).bind(0, D, fitted)
    [(query, key, value)] = rows((150,))

    def fed(*cuts: int) -> Store:
        store = Store(policy)
        for first, last in zip((0, *cuts), (*cuts, 149), strict=True):
            part = (of[None, :, first:last] for of in (query, key, value))
            store.prefill(*part, SPEC)
        return store

    def last(store: Store, sequence: int = 0) -> Tensor:
        times = len(store.lengths)
        store.append(*(of[None, :, -1:].expand(times, -1, -1, -1) for of in (key, value)))
        return store.attend(query[None, :, -1:].expand(times, -1, -1, -1), SPEC)[sequence]

    expected = last(fed())
    one_by_one = Store(policy)
    one_by_one.prefill(*(of[None, :, :5] for of in (query, key, value)), SPEC)
    for token in range(5, 149):
        one_by_one.append(*(of[None, :, token : token + 1] for of in (key, value)))
    back = fed(60, 128)
    back.crop(40)
    back.prefill(*(of[None, :, 109:149] for of in (query, key, value)), SPEC)
    beams = fed()
    beams.reorder(torch.tensor([0, 0, 0]))
    beams.reorder(torch.tensor([2, 1]))
    saved = Store(policy)
    saved.restore(fed().state())
    for found in (last(fed(64)), last(fed(1, 100, 128)), last(one_by_one), last(back), last(beams, 1), last(saved)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_rows_turn_by_a_rotation(fitted):
    """One of rounded numbers would not turn them back to what they were."""
    of = Spectral(**SMALL).bind(1, D, fitted).codewords.on(torch.device("cpu"))
    for name, dims in (("turn_key", D), ("turn_value", DV)):
        torch.testing.assert_close(of[name] @ of[name].mT, torch.eye(dims), rtol=0, atol=1e-6)


def test_bytes_are_those_of_the_formula(fitted):
    n, batch = 150, 3
    for settings, row in (({"bits": 2}, (D + DV) * 4), ({"bits": 4, "rows": 8}, D + DV + 4)):
        policy = Spectral(**{**SMALL, **settings}).bind(0, D, fitted)
        store, sequences = Store(policy), rows((n,) * batch)
        prefilled(store, sequences, SPEC)
        stepped(store, sequences, SPEC)
        codes = n * (16 * settings["bits"] // 8 + 2 + 1) + n // 64 * (DV + 2)
        tables = 2 * HEADS * (6 * (D + DV) + 6 + 2 * D * 16)
        assert store.shared_bytes() == tables
        assert store.bytes_read() == batch * HEADS * (codes + 30 * row) + tables


def test_what_no_token_wrote_is_never_read(fitted):
    policy = Spectral(**SMALL).bind(0, D, fitted)
    sequences, outs = rows((150, 40)), []
    for poison in (0.0, 1e30):
        store = Store(policy)
        prefilled(store, sequences, SPEC)
        for name, buffer in store.tokens.items():
            held = torch.arange(buffer.tensor.shape[2]) < torch.tensor(store.lengths).unsqueeze(1)
            junk = poison if buffer.tensor.is_floating_point() and name != "scale" else 5
            buffer.tensor.masked_fill_(~held[:, None, :, None], junk)
        outs.append(stepped(store, sequences, SPEC))
    assert torch.equal(*outs)


def test_a_sampled_choice_reads_about_its_budget(fitted, numba):
    """In torch never more than half as much again."""
    settings = Spectral(keep=0.1, rank=16, select="max", choice="sampled", sample=64)
    [(query, key, value)] = rows((1500,))
    exact, sampled = (Store(replace(settings, choice=choice).bind(0, D, fitted)) for choice in ("exact", "sampled"))
    for store in (exact, sampled):
        prefilled(store, [(query, key, value)], SPEC)
    outs = [stepped(store, [(query, key, value)], SPEC) for store in (exact, sampled)]
    best, some = (store.read_mask()[0].sum(-1) for store in (exact, sampled))
    assert best.tolist() == [150] * HEADS
    assert all(75 <= count <= 217 for count in some.tolist()), "17 always, 133 chosen; at most 199 of a sample's"
    assert float((outs[0] - outs[1]).norm() / outs[0].norm()) < 0.3
    every = Store(replace(settings, sample=1500).bind(0, D, fitted))
    prefilled(every, [(query, key, value)], SPEC)
    torch.testing.assert_close(stepped(every, [(query, key, value)], SPEC), outs[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows_of", [16, 8])
@pytest.mark.parametrize("select", ["group", "max", "head"])
def test_numba_and_torch_read_the_same(fitted, monkeypatch, rows_of, select):
    """Sampled, with budgets that sinks alone exceed, too."""
    for keep in (0.3, 20, 2):
        settings = Spectral(keep=keep, rank=16, select=select, rows=rows_of, sinks=4, sample=64)
        stores, outs = [Store(settings.bind(0, D, fitted)) for _ in range(2)], []
        for store, numba in zip(stores, (True, False), strict=True):
            monkeypatch.setattr(backend, "has_numba", lambda numba=numba: numba)
            prefilled(store, rows((500, 130, 3)), SPEC)
            outs.append(stepped(store, rows((500, 130, 3)), SPEC))
        torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)
        first, second = (store.read_mask() for store in stores)
        if keep != 2:
            first, second = first[1:], second[1:]  # of the longest one a sample may read more in numba
        assert torch.equal(first, second)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("rows_of", [16, 8])
def test_numba_and_torch_keep_the_same(fitted, monkeypatch, bits, rows_of):
    policy = Spectral(**{**SMALL, "bits": bits, "rows": rows_of}).bind(1, D, fitted)
    key, value = drawn(2, HEADS, 5, D, seed=1) * 2, drawn(2, HEADS, 5, DV, seed=2)
    key[0, 0, 3] = 0
    found = policy.encode(key, value)
    monkeypatch.setattr(backend, "has_numba", lambda: False)
    expected = policy.encode(key, value)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
