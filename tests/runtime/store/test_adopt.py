"""A cache of another method takes over a dense prefill, as if it had prefilled itself."""

from __future__ import annotations

import pytest
import torch
from methods import FORMS
from sequences import Geometry, Row, alone, append, assert_steps, decode, draw, make, prefill
from torch import Tensor

from kvcal.artifacts import KvcalError
from kvcal.runtime.attention import SoftmaxSpec
from kvcal.runtime.kv.saved import Saved
from kvcal.runtime.methods.full import FullPolicy
from kvcal.runtime.settings import new_store
from kvcal.runtime.store import Store

GEOMETRY = Geometry(16, 8, 2, 3)
SPEC = SoftmaxSpec(GEOMETRY.scaling)


def received(store: Store) -> Tensor:
    """[B, Hkv, tokens]"""
    return store.tokens["received"].view.squeeze(-1)


def dense(rows: list[Row], cuts: tuple[int, ...] = (), record_mass: bool = True) -> Store:
    store = new_store(FullPolicy(record_mass, 8))
    prefill(store, rows, SPEC, cuts)
    return store


@pytest.mark.parametrize("cuts", [(), (3, 22)], ids=["once", "chunks"])
@pytest.mark.parametrize("name", FORMS)
def test_adopt_is_prefill(name: str, cuts: tuple[int, ...]) -> None:
    method, settings = FORMS[name]
    rows = draw(GEOMETRY, (9, 40, 1, 33), 5)
    store, direct = make(method, GEOMETRY, **settings), make(method, GEOMETRY, **settings)
    store.take(*dense(rows, cuts).as_they_came())
    prefill(direct, rows, SPEC)
    assert (store.lengths, store.seen) == (direct.lengths, direct.seen)
    assert store.resident_bytes() == direct.resident_bytes()
    for one, other in zip(decode(store, rows, SPEC), decode(direct, rows, SPEC), strict=True):
        assert_steps(one, other)


@pytest.mark.parametrize("name", FORMS)
def test_two_may_adopt_one(name: str) -> None:
    """The dense cache is left as it was, so that a grid of settings shares one prefill."""
    method, settings = FORMS[name]
    rows = draw(GEOMETRY, (9, 40), 5)
    shared = dense(rows)
    before = {key: tensor.clone() for key, tensor in shared.state().items()}
    for _ in range(2):
        store = make(method, GEOMETRY, **settings)
        store.take(*shared.as_they_came())
        for row, got in zip(rows, decode(store, rows, SPEC), strict=True):
            assert_steps(got, alone(method, GEOMETRY, row, SPEC, **settings))
    assert all(torch.equal(before[key], tensor) for key, tensor in shared.state().items())


def test_decoded_tokens_are_adopted_as_prompt() -> None:
    rows = draw(GEOMETRY, (9, 40), 6)
    longer = [Row(*row.tensors(), prompt=row.prompt + 2) for row in rows]
    for name, (method, settings) in FORMS.items():
        shared = dense(rows)
        decode(shared, rows, SPEC, range(2))
        store = make(method, GEOMETRY, **settings)
        store.take(*shared.as_they_came())
        for row, got in zip(longer, decode(store, longer, SPEC, range(4)), strict=True):
            assert_steps(got, alone(method, GEOMETRY, row, SPEC, **settings)), name


def test_selected_rows_are_adopted() -> None:
    rows = draw(GEOMETRY, (9, 40, 20), 5)
    for method, settings in FORMS.values():
        shared = dense(rows)
        shared.reorder(torch.tensor([2, 0]))
        store = make(method, GEOMETRY, **settings)
        store.take(*shared.as_they_came())
        kept = [rows[2], rows[0]]
        for row, got in zip(kept, decode(store, kept, SPEC), strict=True):
            assert_steps(got, alone(method, GEOMETRY, row, SPEC, **settings))


def test_h2o_needs_what_every_token_received() -> None:
    rows = draw(GEOMETRY, (9, 40), 5)
    with pytest.raises(KvcalError, match="record_mass=True"):
        make("h2o", GEOMETRY).take(*dense(rows, record_mass=False).as_they_came())
    # What queries gave that were cropped cannot be told from the sums.
    cropped = dense(rows)
    decode(cropped, rows, SPEC, range(2))
    cropped.crop(2)
    decode(cropped, rows, SPEC, range(2))
    with pytest.raises(KvcalError, match="which h2o starts from, is not known"):
        make("h2o", GEOMETRY).take(*cropped.as_they_came())


def test_recorded_mass_is_that_of_one_prefill() -> None:
    (row,) = draw(GEOMETRY, [300], 4)
    once, stepwise = dense([Row(*row.tensors(), prompt=304)]), dense([row], cuts=(7, 290))
    decode(stepwise, [row], SPEC)
    torch.testing.assert_close(received(stepwise), received(once), rtol=1e-4, atol=1e-5)
    # Each of 304 queries gives 1, and the three query heads of a group are added up.
    torch.testing.assert_close(received(once).sum(-1), torch.full((1, 2), 304.0 * 3), rtol=1e-5, atol=0)


def test_snapkv_needs_the_last_queries() -> None:
    """Of a cache that was cropped they are not known, nor of one that was saved after that."""
    (row,) = draw(GEOMETRY, [40], 3)
    cropped = dense([row])
    cropped.crop(2)
    again = new_store(FullPolicy(True, 8))
    again.restore(cropped.state())
    for source in (new_store(FullPolicy(True)), cropped, again):
        if not source.seen:
            prefill(source, [row], SPEC)
        decode(source, [row], SPEC, range(1))
        with pytest.raises(KvcalError, match="which snapkv starts from, are not known"):
            make("snapkv", GEOMETRY, window=4).take(*source.as_they_came())


def test_what_a_step_has_read_is_told_after_the_next_token_too() -> None:
    (row,) = draw(GEOMETRY, [40], 3)
    store = make("h2o", GEOMETRY, keep=12)
    prefill(store, [row], SPEC)
    (step,) = decode(store, [row], SPEC, range(1))[0]
    last = store.last
    append(store, [row], 1)
    assert torch.equal(last.mask()[0].repeat_interleave(GEOMETRY.group, 0), step.read)


def test_padding_of_any_number_is_no_query() -> None:
    """A prompt shorter than the window, on the left of which anything stands."""
    rows = draw(GEOMETRY, (3, 12), 3)
    store = make("snapkv", GEOMETRY, window=8)
    prefill(store, rows, SPEC)
    state = store.state()
    assert state["last.query"].isfinite().all()
    store.check(Saved(state))
