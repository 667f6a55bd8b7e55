"""A cache of another method takes over a dense prefill, as if it had prefilled itself."""

from __future__ import annotations

import pytest
import torch
from methods import FORMS
from sequences import Geometry, Row, alone, assert_steps, decode, draw, make, prefill
from torch import Tensor

from kvcal.artifacts import KvcalError
from kvcal.runtime.attention import Logits
from kvcal.runtime.methods.full import FullPolicy
from kvcal.runtime.settings import new_store
from kvcal.runtime.store import Store

GEOMETRY = Geometry(16, 8, 2, 3)
LOGITS = Logits(GEOMETRY.scaling)


def received(store: Store) -> Tensor:
    """[B, Hkv, tokens]"""
    return store.tokens["received"].view.squeeze(-1)


def dense(rows: list[Row], cuts: tuple[int, ...] = (), record_mass: bool = True) -> Store:
    store = new_store(FullPolicy(record_mass, 8))
    prefill(store, rows, LOGITS, cuts)
    return store


@pytest.mark.parametrize("cuts", [(), (3, 22)], ids=["once", "chunks"])
@pytest.mark.parametrize("name", FORMS)
def test_adopt_is_prefill(name: str, cuts: tuple[int, ...]) -> None:
    method, settings = FORMS[name]
    rows = draw(GEOMETRY, (9, 40, 1, 33), 5)
    store, direct = make(method, GEOMETRY, **settings), make(method, GEOMETRY, **settings)
    store.take(*dense(rows, cuts).as_they_came())
    prefill(direct, rows, LOGITS)
    assert (store.lengths, store.seen) == (direct.lengths, direct.seen)
    assert store.resident_bytes() == direct.resident_bytes()
    for one, other in zip(decode(store, rows, LOGITS), decode(direct, rows, LOGITS), strict=True):
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
        for row, got in zip(rows, decode(store, rows, LOGITS), strict=True):
            assert_steps(got, alone(method, GEOMETRY, row, LOGITS, **settings))
    assert all(torch.equal(before[key], tensor) for key, tensor in shared.state().items())


def test_decoded_tokens_are_adopted_as_prompt() -> None:
    rows = draw(GEOMETRY, (9, 40), 6)
    longer = [Row(*row.tensors(), prompt=row.prompt + 2) for row in rows]
    for name, (method, settings) in FORMS.items():
        shared = dense(rows)
        decode(shared, rows, LOGITS, range(2))
        store = make(method, GEOMETRY, **settings)
        store.take(*shared.as_they_came())
        for row, got in zip(longer, decode(store, longer, LOGITS, range(4)), strict=True):
            assert_steps(got, alone(method, GEOMETRY, row, LOGITS, **settings)), name


def test_selected_rows_are_adopted() -> None:
    rows = draw(GEOMETRY, (9, 40, 20), 5)
    for method, settings in FORMS.values():
        shared = dense(rows)
        shared.reorder(torch.tensor([2, 0]))
        store = make(method, GEOMETRY, **settings)
        store.take(*shared.as_they_came())
        kept = [rows[2], rows[0]]
        for row, got in zip(kept, decode(store, kept, LOGITS), strict=True):
            assert_steps(got, alone(method, GEOMETRY, row, LOGITS, **settings))


def test_h2o_needs_what_every_token_received() -> None:
    rows = draw(GEOMETRY, (9, 40), 5)
    with pytest.raises(KvcalError, match="record_mass=True"):
        make("h2o", GEOMETRY).take(*dense(rows, record_mass=False).as_they_came())
    # What queries gave that were cropped cannot be told from the sums.
    cropped = dense(rows)
    decode(cropped, rows, LOGITS, range(2))
    cropped.crop(2)
    decode(cropped, rows, LOGITS, range(2))
    with pytest.raises(KvcalError, match="h2o starts from the attention"):
        make("h2o", GEOMETRY).take(*cropped.as_they_came())


def test_recorded_mass_is_that_of_one_prefill() -> None:
    (row,) = draw(GEOMETRY, [300], 4)
    once, stepwise = dense([Row(*row.tensors(), prompt=304)]), dense([row], cuts=(7, 290))
    decode(stepwise, [row], LOGITS)
    torch.testing.assert_close(received(stepwise), received(once), rtol=1e-4, atol=1e-5)
    # Each of 304 queries gives 1, and the three query heads of a group are added up.
    torch.testing.assert_close(received(once).sum(-1), torch.full((1, 2), 304.0 * 3), rtol=1e-5, atol=0)
