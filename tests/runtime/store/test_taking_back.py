"""`crop`, also of guesses: what was taken back never was."""

from __future__ import annotations

import pytest
import torch
from methods import EVICTING, FORMS, KEEPING
from sequences import Geometry, Row, alone, append, assert_steps, decode, draw, fork, make, prefill

from kvcal.artifacts import KvcalError
from kvcal.runtime.attention import SoftmaxSpec

GEOMETRY = Geometry(16, 8, 2, 3)
SPEC = SoftmaxSpec(GEOMETRY.scaling)


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("name", KEEPING)
def test_crop_decoded_tokens(name: str, count: int) -> None:
    method, settings = FORMS[name]
    rows = draw(GEOMETRY, (9, 40, 1, 33), 10)
    store = make(method, GEOMETRY, **settings)
    prefill(store, rows, SPEC)
    decode(store, rows, SPEC, range(5))
    store.crop(count)
    kept = 5 - count
    assert store.seen == 40 + kept and store.lengths == [row.prompt + kept for row in rows]
    forks = [fork(row, kept, seed) for seed, row in enumerate(rows)]
    for row, got in zip(forks, decode(store, forks, SPEC, range(kept, 10)), strict=True):
        assert_steps(got, alone(method, GEOMETRY, row, SPEC, **settings)[kept:])


@pytest.mark.parametrize("name", KEEPING)
def test_crop_leaves_the_state_of_a_shorter_row(name: str) -> None:
    """Into the prompt; boxes, means and indices too."""
    method, settings = FORMS[name]
    (row,) = draw(GEOMETRY, [40], 5)
    store, never = make(method, GEOMETRY, **settings), make(method, GEOMETRY, **settings)
    prefill(store, [row], SPEC)
    decode(store, [row], SPEC)
    store.crop(5 + 17)
    prefill(never, [Row(*row.tensors(), prompt=23)], SPEC)
    state, expected = store.state(), never.state()
    assert state.keys() == expected.keys()
    if "recent_position" in expected:  # of so many tokens less some rows are gone, and none is another's
        held = state.pop("recent_position")
        assert ((held == -1) | (held == expected.pop("recent_position"))).all()
        for tensor in ("recent_key", "recent_value"):
            found, wanted = (rows.pop(tensor).transpose(1, 2)[held >= 0] for rows in (state, expected))
            torch.testing.assert_close(found, wanted)
    for tensor in expected:
        torch.testing.assert_close(state[tensor], expected[tensor], msg=tensor)


@pytest.mark.parametrize("name", KEEPING)
def test_crop_padded_prompts(name: str) -> None:
    """Padding lies at the left, so what is cropped are tokens of each row, until a row has none left."""
    method, settings = FORMS[name]
    rows = draw(GEOMETRY, (9, 40), 5)
    store = make(method, GEOMETRY, **settings)
    prefill(store, rows, SPEC)
    store.crop(6)
    assert store.lengths == [3, 34]
    shorter = [Row(*row.tensors(), prompt=row.prompt - 6) for row in rows]
    for row, got in zip(shorter, decode(store, shorter, SPEC, range(5)), strict=True):
        assert_steps(got, alone(method, GEOMETRY, row, SPEC, **settings)[:5])
    with pytest.raises(KvcalError, match="cannot crop 100 tokens"):
        store.crop(100)


@pytest.mark.parametrize("name", KEEPING)
def test_crop_everything(name: str) -> None:
    method, settings = FORMS[name]
    first, second = draw(GEOMETRY, [30, 20], 3)
    store = make(method, GEOMETRY, **settings)
    prefill(store, [first], SPEC)
    store.crop(30)
    assert store.lengths == [0] and store.seen == 0
    prefill(store, [second], SPEC)
    assert_steps(decode(store, [second], SPEC)[0], alone(method, GEOMETRY, second, SPEC, **settings))


@pytest.mark.parametrize("settled", [0, 4])
@pytest.mark.parametrize("accepted", [0, 1, 3])
@pytest.mark.parametrize("name", EVICTING)
def test_guesses_come_back_out(name: str, accepted: int, settled: int) -> None:
    """Three guesses, of which `accepted` stay, after `settled` usual steps: evictions are undone too."""
    method, settings = FORMS[name]
    rows = draw(GEOMETRY, (9, 40, 1, 33), 10)
    store = make(method, GEOMETRY, **settings)
    prefill(store, rows, SPEC)
    decode(store, rows, SPEC, range(settled))
    decode(store, rows, SPEC, range(settled, settled + 3), revocable=True)
    store.crop(3 - accepted)
    store.settle()
    stay = settled + accepted
    forks = [fork(row, stay, seed) for seed, row in enumerate(rows)]
    assert store.seen == 40 + stay and store.lengths == [row.prompt + stay for row in rows]
    for row, got in zip(forks, decode(store, forks, SPEC, range(stay, 10)), strict=True):
        assert_steps(got, alone(method, GEOMETRY, row, SPEC, **settings)[stay:])


@pytest.mark.parametrize("name", EVICTING)
def test_what_was_evicted_cannot_come_back(name: str) -> None:
    method, settings = FORMS[name]
    (row,) = draw(GEOMETRY, [40], 6)
    store = make(method, GEOMETRY, **settings)
    prefill(store, [row], SPEC)
    decode(store, [row], SPEC, range(2))
    with pytest.raises(KvcalError, match=f"{method} cannot take back the last 1 tokens, [^\n]+$"):
        store.crop(1)
    append(store, [row], 2, revocable=True)
    with pytest.raises(KvcalError, match="cannot take back the last 2"):
        store.crop(2)
    store.crop(1)
    got = decode(store, [row], SPEC, range(2, 6))[0]
    assert_steps(got, alone(method, GEOMETRY, row, SPEC, **settings)[2:])


def test_streaming_takes_back_what_it_has_not_evicted() -> None:
    (row,) = draw(GEOMETRY, [40], 6)
    store = make("streaming", GEOMETRY, keep=0.25)
    prefill(store, [row], SPEC)
    store.crop(10)
    shorter = Row(*row.tensors(), prompt=30)
    assert_steps(
        decode(store, [shorter], SPEC, range(6))[0], alone("streaming", GEOMETRY, shorter, SPEC, keep=0.25)[:6]
    )


def test_guesses_are_gone_with_what_came_before_them() -> None:
    (row,) = draw(GEOMETRY, [24], 6)
    store = make("streaming", GEOMETRY, keep=100)
    prefill(store, [row], SPEC)
    decode(store, [row], SPEC, range(2), revocable=True)
    store.crop(5)
    assert store.lengths == [21]
    store.crop(1)
    assert store.lengths == [20]
