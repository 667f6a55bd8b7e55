"""What all stores must do, of SubGen's: adopt, select, take back, save, refuse; and its seeds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sequences import Row, assert_steps, decode, draw, prefill
from subgen_stores import GEOMETRY, PROMPTS, SMALL, SPEC, alone, make
from torch import Tensor

from kvcal.artifacts import KvcalError
from kvcal.runtime.methods.subgen import SubGen
from kvcal.runtime.settings import new_store


@pytest.mark.parametrize("index", [[2, 0, 3, 1], [1, 1, 0], [0], [2, 0]], ids=str)
@pytest.mark.parametrize("straight", [False, True])
def test_select(index: list[int], straight: bool) -> None:
    rows = draw(GEOMETRY, PROMPTS, 12)
    store, whole = make(), make()
    for of in (store, whole):
        prefill(of, rows, SPEC)
        decode(of, rows, SPEC, range(3))
        if straight:
            of.prefill(*(torch.stack([row.tensors()[i][:, row.prompt + 3 :][:, :3] for row in rows]) for i in range(3)), SPEC)  # fmt: skip # noqa: E501
    start = 6 if straight else 3
    store.reorder(torch.tensor(index))
    taken = decode(store, [rows[at] for at in index], SPEC, range(start, 12))
    every = decode(whole, rows, SPEC, range(start, 12))
    for at, got in zip(index, taken, strict=True):
        assert_steps(got, every[at])


def test_what_is_gone_cannot_come_back() -> None:
    (row,) = draw(GEOMETRY, [40], 6)
    store = make()
    prefill(store, [row], SPEC)
    store.crop(10)
    shorter = Row(*row.tensors(), prompt=30)
    decode(store, [shorter], SPEC, range(2))
    with pytest.raises(KvcalError, match=r"subgen cannot take back the last 1 tokens[^\n]+$"):
        store.crop(1)
    assert_steps(decode(store, [shorter], SPEC, range(2, 6))[0], alone(shorter)[2:6])


@pytest.mark.parametrize("second", [0, 5])
def test_saved_and_restored(second: int) -> None:
    rows = draw(GEOMETRY, PROMPTS, 16)
    store = make()
    prefill(store, rows, SPEC)
    decode(store, rows, SPEC, range(4))
    if second:
        new = (torch.stack([row.tensors()[i][:, row.prompt + 4 :][:, :second] for row in rows]) for i in range(3))
        store.prefill(*new, SPEC)
    other = make()
    other.restore({name: tensor.clone() for name, tensor in store.state().items()})
    other.to("cpu")
    assert other.resident_bytes() == store.resident_bytes()
    steps = range(4 + second, 16)
    for one, two in zip(decode(store, rows, SPEC, steps), decode(other, rows, SPEC, steps), strict=True):
        assert_steps(one, two)


def test_seeds() -> None:
    (row,) = draw(GEOMETRY, [80], 2)
    outputs: list[Tensor] = [alone(row, seed=seed)[0].output for seed in (1, 1, 2)]
    assert torch.equal(outputs[0], outputs[1]) and not torch.allclose(outputs[0], outputs[2], rtol=1e-2)


def test_layers_draw_their_own_numbers() -> None:
    (row,) = draw(GEOMETRY, [80], 2)
    outputs = []
    for layer, seed in ((0, 0), (1, 0), (0, 1)):
        store = new_store(SubGen(**SMALL, seed=seed).bind(layer, GEOMETRY.dim, None))
        prefill(store, [row], SPEC)
        outputs.append(decode(store, [row], SPEC)[0][0].output)
    assert not any(torch.allclose(outputs[a], outputs[b], rtol=1e-2) for a, b in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 0}, "window 0: give a whole number of at least 1"),
        ({"window": 0.25}, "window 0.25: give a whole number"),
        ({"clusters": 0}, "clusters 0"),
        ({"t": 0}, "t 0"),
        ({"s": True}, "s True"),
        ({"sinks": -1}, "sinks -1: give a whole number of at least 0"),
        ({"delta": 0}, "delta 0: give a distance, or None for the calibrated one, from 1e-30"),
        ({"delta": "1"}, "delta '1': give a distance"),
        ({"normaliser": "keys"}, "normaliser 'keys': give clusters or values"),
        ({"growth": 1.0}, "growth 1.0: give a factor from 1.01"),
    ],
)
def test_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(KvcalError, match=message):
        make(**settings)
