"""What must come to the same: whole budgets and dense attention, chunks and one prefill, a batch and its rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from methods import FORMS
from oracles import full
from sequences import TOLERANCES, Geometry, alone, append, assert_steps, decode, draw, fork, make, prefill

from kvcal.runtime.attention import SoftmaxSpec

GEOMETRY = Geometry(16, 8, 2, 3)
SPEC = SoftmaxSpec(GEOMETRY.scaling)
PROMPTS = (9, 40, 1, 33)
IN_GROUPS = ("xcla", "spectral-xcla-rows")
"""Which keep no row as it came."""


@pytest.fixture(params=FORMS)
def variant(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return FORMS[request.param]


@pytest.mark.parametrize("whole", [{"keep": 1.0}, {"keep": 10**6}, {"keep": 46}, {"dense_below": 1000}], ids=str)
@pytest.mark.parametrize("sinks", [None, torch.linspace(-1, 2, 6)], ids=["plain", "sinks"])
@pytest.mark.parametrize("name", [name for name in FORMS if name not in ("full", "spectral-8-bit-rows", *IN_GROUPS)])
def test_whole_budget_is_full(name: str, whole: dict[str, Any], sinks: torch.Tensor | None) -> None:
    method, settings = FORMS[name]
    if method == "subgen" and "keep" in whole:
        whole = {"window": 46}
    spec, rows = SoftmaxSpec(GEOMETRY.scaling, sink_logits=sinks), draw(GEOMETRY, PROMPTS, 6)
    store = make(method, GEOMETRY, **{**settings, **whole})
    prefill(store, rows, spec)
    for row, got in zip(rows, decode(store, rows, spec), strict=True):
        assert_steps(got, full(row, spec))


@pytest.mark.parametrize("cuts", [(20,), (3, 4, 38), tuple(range(1, 40))], ids=["halves", "ragged", "single tokens"])
def test_chunks_are_one_prefill(variant: tuple[str, dict[str, Any]], cuts: tuple[int, ...]) -> None:
    method, settings = variant
    rows = draw(GEOMETRY, PROMPTS, 6)
    once, chunked = make(method, GEOMETRY, **settings), make(method, GEOMETRY, **settings)
    expected, got = prefill(once, rows, SPEC), prefill(chunked, rows, SPEC, cuts)
    tolerance = TOLERANCES[torch.float32]
    if (
        method == "xcla" or settings.get("rows") == "xcla"
    ):  # of an earlier chunk what is kept of it is read, in 8 bits here
        tolerance = {"rtol": 0.03, "atol": 0.03}
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)
    assert chunked.lengths == once.lengths and chunked.seen == once.seen
    for one, other in zip(decode(chunked, rows, SPEC), decode(once, rows, SPEC), strict=True):
        assert_steps(one, other)


def test_padded_batch_is_its_rows_alone(variant: tuple[str, dict[str, Any]]) -> None:
    method, settings = variant
    rows = draw(GEOMETRY, PROMPTS, 6)
    store = make(method, GEOMETRY, **settings)
    prefill(store, rows, SPEC)
    for row, got in zip(rows, decode(store, rows, SPEC), strict=True):
        assert_steps(got, alone(method, GEOMETRY, row, SPEC, **settings))


def test_padding_among_decoded_tokens_is_not_stored(variant: tuple[str, dict[str, Any]]) -> None:
    """A row that pauses for one step goes on as if nothing had been."""
    method, settings = variant
    rows = draw(GEOMETRY, (9, 40), 6)
    store = make(method, GEOMETRY, **settings)
    prefill(store, rows, SPEC)
    decode(store, rows, SPEC, range(2))
    nothing = torch.full((2, GEOMETRY.kv_heads, 1, GEOMETRY.dim), torch.nan)
    store.append(nothing, nothing[..., : GEOMETRY.value_dim], torch.zeros(2, 1, dtype=torch.bool))
    assert store.lengths == [11, 42] and store.seen == 43
    for row, got in zip(rows, decode(store, rows, SPEC, range(2, 6)), strict=True):
        assert_steps(got, alone(method, GEOMETRY, row, SPEC, **settings)[2:])


@pytest.mark.parametrize("keep", [0.25, 8], ids=str)
def test_one_row_pauses(variant: tuple[str, dict[str, Any]], keep: float) -> None:
    """The other keeps to its budget, and both go on as if alone."""
    method, settings = variant
    settings = settings if method in ("full", "subgen", "xcla") else {**settings, "keep": keep}
    rows = draw(GEOMETRY, (30, 40), 6)
    ahead, behind = (alone(method, GEOMETRY, row, SPEC, **settings) for row in rows)
    store = make(method, GEOMETRY, **settings)
    prefill(store, rows, SPEC)
    for step in range(2):
        query, key, value = (
            torch.stack([row.tensors()[which][:, row.prompt + step : row.prompt + step + 1] for row in rows])
            for which in range(3)
        )
        store.append(key, value, torch.tensor([[True], [step == 0]]))
        output = store.attend(query, SPEC)
        torch.testing.assert_close(output[0, :, 0].double(), ahead[step].output.double(), **TOLERANCES[torch.float32])
    assert store.lengths == [32, 41] and store.seen == 42
    first = type(rows[0])(*rows[0].tensors(), prompt=31)
    taken = decode(store, [first, rows[1]], SPEC, range(1, 5))
    assert_steps(taken[0], ahead[2:6])
    assert_steps(taken[1], behind[1:5])


@pytest.mark.parametrize("index", [[2, 0, 3, 1], [1, 1, 0, 1, 1], [0], [2, 0]], ids=str)
def test_select_is_those_rows(variant: tuple[str, dict[str, Any]], index: list[int]) -> None:
    """Reordered, repeated, or fewer and shorter; each then goes its own way."""
    method, settings = variant
    rows = draw(GEOMETRY, PROMPTS, 8)
    store = make(method, GEOMETRY, **settings)
    prefill(store, rows, SPEC)
    decode(store, rows, SPEC, range(3))
    store.reorder(torch.tensor(index))
    forks = [fork(rows[of], 3, seed) for seed, of in enumerate(index)]
    for row, got in zip(forks, decode(store, forks, SPEC, range(3, 8)), strict=True):
        assert_steps(got, alone(method, GEOMETRY, row, SPEC, **settings)[3:])


def test_state_goes_on_elsewhere(variant: tuple[str, dict[str, Any]]) -> None:
    method, settings = variant
    rows = draw(GEOMETRY, PROMPTS, 6)
    store, restored = make(method, GEOMETRY, **settings), make(method, GEOMETRY, **settings)
    prefill(store, rows, SPEC)
    decode(store, rows, SPEC, range(2))
    restored.restore({name: tensor.clone() for name, tensor in store.state().items()})
    assert restored.lengths == store.lengths and restored.seen == store.seen
    for one, other in zip(
        decode(restored, rows, SPEC, range(2, 6)), decode(store, rows, SPEC, range(2, 6)), strict=True
    ):
        assert_steps(one, other)
    assert restored.bytes_read() == store.bytes_read() and restored.resident_bytes() == store.resident_bytes()


@pytest.mark.parametrize("name", ["full", "loki-score", "quest", "sparq", "spectral", "h2o"])
def test_decoding_grows_across_chunks(name: str) -> None:
    method, settings = FORMS[name]
    small = Geometry(4, 4, 1, 1)
    (row,) = draw(small, [250], 530)
    store = make(method, small, **settings)
    prefill(store, [row], SPEC)
    for step in range(500):
        append(store, [row], step)
    if method != "h2o":
        torch.testing.assert_close(store.tokens["key"].view[0], row.key[:, :750])
        torch.testing.assert_close(store.tokens["value"].view[0], row.value[:, :750])
        late = type(row)(*row.tensors(), prompt=750)
        assert_steps(decode(store, [row], SPEC, range(500, 530))[0], alone(method, small, late, SPEC, **settings))
    else:
        held = store.tokens["position"].view[0, :, :, 0].long()
        assert held.shape[1] == 188  # ceil(750 / 4)
        torch.testing.assert_close(store.tokens["key"].view[0, 0], row.key[0, held[0]])
