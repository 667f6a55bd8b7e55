"""SubGen's store against the paper's algorithm written out token by token."""

from __future__ import annotations

import itertools
from typing import Any

import oracle_subgen
import pytest
import torch
from oracle_heads import heads_at
from sequences import Geometry, Row, Step, assert_steps, decode, draw, prefill
from subgen_stores import CLOSE, GEOMETRY, PROMPTS, SMALL, SPEC, alone, make

from kvcal.runtime.attention import SoftmaxSpec
from kvcal.runtime.methods.full import FullPolicy
from kvcal.runtime.methods.subgen import SubGen, policy, sketch
from kvcal.runtime.settings import new_store


def oracle(row: Row, spec: SoftmaxSpec, tokens: int, **settings: Any) -> Step:
    """What the last of `tokens` tokens gets."""
    chosen = SubGen(**{**SMALL, **settings})
    row = row.double()
    first_recent = max(chosen.sinks, tokens - chosen.window)
    exact = [at for at in range(tokens) if at < chosen.sinks or at >= first_recent]
    outputs = []
    for kv_head in range(row.key.shape[0]):
        heads = heads_at(row, spec, kv_head, tokens)
        sketch = oracle_subgen.HeadSketch(
            *(
                chosen.clusters,
                chosen.growth,
                chosen.t,
                chosen.s,
                chosen.seed * policy.MOST_LAYERS,
                kv_head,
                chosen.delta or 0.0,
            ),
            chosen.normaliser,
        )
        for at in range(chosen.sinks, first_recent):
            sketch.add(row.key[kv_head, at], row.value[kv_head, at], at)
        outputs += [oracle_subgen.attend(head, exact, sketch) for head in heads]
    read = torch.zeros(len(outputs), tokens, dtype=torch.bool)
    read[:, exact] = True
    return Step(torch.stack(outputs), read)


def assert_oracle(got: list[Step], row: Row, spec: SoftmaxSpec = SPEC, **settings: Any) -> None:
    for number, step in enumerate(got):
        expected = oracle(row, spec, row.prompt + number + 1, **settings)
        assert torch.equal(step.read, expected.read), number
        torch.testing.assert_close(step.output.double(), expected.output, **CLOSE)


@pytest.mark.parametrize("block", [1, 5, 256])
@pytest.mark.parametrize(
    "geometry",
    [Geometry(64, 64, 2, 1), Geometry(80, 80, 1, 4), Geometry(128, 128, 2, 7), Geometry(256, 256, 1, 2), GEOMETRY],
    ids=lambda geometry: f"D{geometry.dim}G{geometry.group}",
)
def test_is_the_paper_token_by_token(geometry: Geometry, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sketch, "BLOCK", block)
    spec = SoftmaxSpec(geometry.scaling)
    rows = draw(geometry, PROMPTS, 4)
    store = make()
    prefill(store, rows, spec)
    for row, got in zip(rows, decode(store, rows, spec), strict=True):
        assert_oracle(got, row, spec)


@pytest.mark.parametrize(
    "settings",
    [
        *({"delta": 4.0}, {"growth": 2.0}, {"clusters": 1}, {"clusters": 100}, {"sinks": 0}, {"window": 1}),
        *({"seed": 9}, {"normaliser": "values"}),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        SoftmaxSpec(GEOMETRY.scaling, softcap=2.0),
        SoftmaxSpec(GEOMETRY.scaling, sink_logits=torch.linspace(-2, 3, 6)),
    ],
    ids=["plain", "softcap", "sinks"],
)
def test_settings_and_logits(settings: dict[str, Any], spec: SoftmaxSpec) -> None:
    (row,) = draw(GEOMETRY, [40], 3)
    assert_oracle(alone(row, spec, **settings), row, spec, **settings)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    (row,) = draw(GEOMETRY, [40], 3, dtype=dtype)
    for number, step in enumerate(alone(row)):
        expected = oracle(row, SPEC, 41 + number)
        tolerance = CLOSE if dtype is torch.float64 else {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(step.output.double(), expected.output, **tolerance)


@pytest.mark.parametrize("dim", [8, 64])
def test_blocks_are_tokens(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sketch is the same bit for bit, merges included."""
    (row,) = draw(Geometry(dim, 8, 2, 1), [700], 1)
    found = []
    for block in (1, 7, 64, 256):
        monkeypatch.setattr(sketch, "BLOCK", block)
        store = make(clusters=20, s=31)
        prefill(store, [row], SPEC)
        decode(store, [row], SPEC)
        found.append(store.sequence_index.parts)
    assert (found[0]["active"] > 1).all() and (found[0]["count"].sum(-1) == 693).all()
    for other in found[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in found[0].items())


def test_decoding_is_prefilling() -> None:
    """The sketch does not depend on whether its tokens were decoded or part of the prompt."""
    (row,) = draw(GEOMETRY, [3], 60)
    late = Row(*row.tensors(), prompt=60)
    assert_steps(alone(row)[57:], alone(late))


def test_a_row_of_a_batch_is_the_row_alone() -> None:
    rows = draw(GEOMETRY, (9, 200, 1, 33), 5)
    store = make()
    prefill(store, rows, SPEC)
    for row, got in zip(rows, decode(store, rows, SPEC), strict=True):
        assert_steps(got, alone(row))
    lone = make()
    prefill(lone, rows[1:2], SPEC)
    decode(lone, rows[1:2], SPEC)
    for name, tensor in lone.sequence_index.parts.items():
        assert torch.equal(store.sequence_index.parts[name][1], tensor[0]), name


def test_one_row_pauses() -> None:
    """The other keeps to its window."""
    rows = draw(GEOMETRY, (30, 40), 6)
    ahead, behind = (alone(row) for row in rows)
    store = make()
    prefill(store, rows, SPEC)
    for step, comes in enumerate((True, False)):
        query, key, value = (
            torch.stack([row.tensors()[which][:, row.prompt + step : row.prompt + step + 1] for row in rows])
            for which in range(3)
        )
        store.append(key, value, torch.tensor([[True], [comes]]))
        torch.testing.assert_close(store.attend(query, SPEC)[0, :, 0], ahead[step].output)
    assert store.lengths == [32, 41] and store.held == [8, 8]
    taken = decode(store, [Row(*rows[0].tensors(), prompt=31), rows[1]], SPEC, range(1, 5))
    assert_steps(taken[0], ahead[2:])
    assert_steps(taken[1], behind[1:5])


@pytest.mark.parametrize("settings", [{"window": 100}, {"sinks": 50}, {"dense_below": 1000}], ids=str)
def test_everything_held_is_full(settings: dict[str, Any]) -> None:
    rows = draw(GEOMETRY, PROMPTS, 5)
    store, full = make(**settings), new_store(FullPolicy())
    for of in (store, full):
        prefill(of, rows, SPEC)
    for got, expected in zip(decode(store, rows, SPEC), decode(full, rows, SPEC), strict=True):
        assert_steps(got, expected)
    assert not store.sequence_index.parts


def test_dense_below() -> None:
    """The row that reaches it hands over all that its window cannot hold."""
    rows = draw(GEOMETRY, (38, 20), 6)
    store = make(dense_below=42)
    prefill(store, rows, SPEC)
    for step in range(6):
        taken = decode(store, rows, SPEC, range(step, step + 1))
        assert store.held == [39 + step if 39 + step < 42 else 8, 21 + step]
        if step < 3:
            assert taken[0][0].read.all() and taken[1][0].read.all()
        else:
            torch.testing.assert_close(taken[0][0].output.double(), oracle(rows[0], SPEC, 39 + step).output, **CLOSE)


@pytest.mark.parametrize("cuts", [(), (3,), (1, 2, 9)], ids=str)
def test_second_prompt(cuts: tuple[int, ...]) -> None:
    """Its tokens see one another, the window and the sketch; nothing leaves before the next decoded token."""
    (row,) = draw(GEOMETRY, [40], 20)
    store = make()
    prefill(store, [row], SPEC)
    decode(store, [row], SPEC, range(4))
    new = [tensor[:, 44:56].unsqueeze(0) for tensor in row.tensors()]
    parts = []
    for start, stop in itertools.pairwise((0, *cuts, 12)):
        parts.append(store.prefill(*(tensor[:, :, start:stop] for tensor in new), SPEC))
    assert store.held == [8 + 12] and store.lengths == [56]
    output = torch.cat(parts, 2)
    for at in (0, 5, 11):
        # As though the window had been larger by the tokens that came since.
        expected = oracle(row, SPEC, 45 + at, window=6 + at + 1)
        torch.testing.assert_close(output[0, :, at].double(), expected.output, **CLOSE)
    later = Row(*row.tensors(), prompt=56)
    assert_oracle(decode(store, [later], SPEC)[0], later)


def test_a_prompt_after_everything_exact_has_left() -> None:
    """It sees the sketch, and its own tokens."""
    (row,) = draw(GEOMETRY, [40], 12)
    store = make(window=1, sinks=0)
    prefill(store, [row], SPEC)
    store.make_room()
    assert store.held == [0]
    output = store.prefill(*(tensor[None, :, 40:52] for tensor in row.tensors()), SPEC)
    for at in (0, 11):
        expected = oracle(row, SPEC, 41 + at, sinks=0, window=at + 1)
        torch.testing.assert_close(output[0, :, at].double(), expected.output, **CLOSE)
