"""The house, tried with a method of thirty lines that keeps something beside each token and selects by it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from sequences import Geometry, alone, assert_steps, decode, draw, prefill
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from kvcal.artifacts import Artifact
from kvcal.runtime.attention import SoftmaxSpec, attention
from kvcal.runtime.fixed_step import Clock, FixedStep
from kvcal.runtime.kv.pages import LayerCache
from kvcal.runtime.methods import METHODS
from kvcal.runtime.methods.base import Attended, Method, Policy, Reading, Selected
from kvcal.runtime.methods.full import Full
from kvcal.runtime.settings import new_store

GEOMETRY = Geometry(16, 8, 2, 3)
SPEC = SoftmaxSpec(GEOMETRY.scaling)
PROMPTS = (9, 80, 1, 63)
KEEP = 5


@dataclass(frozen=True)
class Longest(Method):
    """The tokens of the longest keys are read, and the last."""

    def bind(self, layer: int, head_dim: int, artifact: Artifact | None) -> Policy:
        return LongestPolicy()


class LongestPolicy(Policy):
    def encode(self, key: Tensor, value: Tensor) -> Mapping[str, Tensor]:
        return {"key": key, "value": value, "length": key.float().norm(dim=-1, keepdim=True)}

    def step(self, query: Tensor, cache: LayerCache, spec: SoftmaxSpec) -> Attended:
        lengths, positions = cache.metadata.seq_lens.view(-1, 1, 1), cache.metadata.positions()
        by = cache.tokens("length").squeeze(-1).masked_fill(positions == lengths - 1, torch.inf)
        found = by.masked_fill(positions >= lengths, -torch.inf).topk(min(KEEP, by.shape[-1]))
        valid = found.values > -torch.inf
        key, value = cache.gather(("key", "value"), found.indices)
        out = attention(query, key, value, spec, valid.unsqueeze(2))
        return Attended(out, Selected(found.indices.unsqueeze(2), valid.unsqueeze(2)))

    def selection_bytes(self, reading: Reading) -> int:
        return 4 * GEOMETRY.kv_heads * reading.tokens()


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(METHODS, "longest", Longest)


def store():
    return new_store(Longest().bind(0, GEOMETRY.dim, None))


def filled(*cuts):
    made, rows = store(), draw(GEOMETRY, PROMPTS, 6)
    prefill(made, rows, SPEC, cuts)
    return made, rows


def test_a_step_is_attention_to_what_it_says_that_it_read():
    made, rows = filled()
    for row, steps in zip(rows, decode(made, rows, SPEC), strict=True):
        for number, step in enumerate(steps):
            tokens = row.prompt + number + 1
            for head in range(GEOMETRY.heads):
                key, value = (part[head // GEOMETRY.group, :tokens].double() for part in (row.key, row.value))
                longest = key.norm(dim=-1)
                longest[-1] = torch.inf
                read = set(longest.argsort(descending=True)[:KEEP].tolist())
                assert set(step.read[head].nonzero().flatten().tolist()) == read
                own = sorted(read)
                weights = (row.query[head, tokens - 1].double() @ key[own].T * GEOMETRY.scaling).softmax(0)
                torch.testing.assert_close(step.output[head].double(), weights @ value[own], rtol=1e-4, atol=1e-5)


def test_bytes_are_what_was_read_and_what_is_kept_beside():
    made, rows = filled()
    decode(made, rows, SPEC, range(2))
    lengths = [prompt + 2 for prompt in PROMPTS]
    row = (GEOMETRY.dim + GEOMETRY.value_dim) * 4
    read = sum(min(KEEP, length) for length in lengths)
    assert made.bytes_read() == GEOMETRY.kv_heads * (read * row + 4 * sum(lengths))


@pytest.mark.parametrize("cuts", [(20,), (3, 4, 78), tuple(range(1, 80))], ids=["two", "ragged", "single tokens"])
def test_chunks_and_rows_alone(cuts):
    made, rows = filled(*cuts)
    for row, got in zip(rows, decode(made, rows, SPEC), strict=True):
        assert_steps(got, alone("longest", GEOMETRY, row, SPEC))


def test_what_is_kept_beside_goes_with_its_token():
    """Taken back, chosen for other rows, saved without it and restored."""
    made, rows = filled()
    decode(made, rows, SPEC, range(3))
    made.crop(2)
    made.reorder(torch.tensor([1, 3, 1]))
    state = made.state()
    assert "rows.length" not in state
    again = store()
    again.restore(state)
    chosen = [rows[1], rows[3], rows[1]]
    for each in (made, again):
        for row, got in zip(chosen, decode(each, chosen, SPEC, range(1, 5)), strict=True):
            assert_steps(got, alone("longest", GEOMETRY, row, SPEC)[1:5])


@pytest.mark.parametrize("told", [False, True], ids=["as captured", "as run from Python"])
def test_steps_of_fixed_shapes_are_the_same(told):
    eager, rows = filled()
    stepped, _ = filled()
    clock = Clock(stepped.lengths, torch.device("cpu"))
    step = FixedStep(stepped, clock)
    step.reserve(300)
    for number in range(6):
        query, key, value = (
            torch.stack([row.tensors()[which][:, row.prompt + number : row.prompt + number + 1] for row in rows])
            for which in range(3)
        )
        eager.append(key, value)
        seen = [prompt + number + 1 for prompt in PROMPTS]
        clock.told = (min(seen), max(seen)) if told else None
        torch.testing.assert_close(step.step(query, key, value, SPEC), eager.attend(query, SPEC))
        clock.tick()
    stepped.count(6)
    assert stepped.lengths == eager.lengths
    assert torch.equal(stepped.tokens["length"].view, eager.tokens["length"].view)


@pytest.mark.parametrize("method", [Longest(), Full()], ids=["longest", "full"])
def test_no_tensor_outlives_its_use(method):
    """What was read is told without the buffers that it was read from: they may have been exchanged since."""
    made, rows = new_store(method.bind(0, GEOMETRY.dim, None)), draw(GEOMETRY, PROMPTS, 2)
    prefill(made, rows, SPEC)
    decode(made, rows, SPEC)
    reading = made.last.bytes_read
    before = [StorageWeakRef(each.tensor.untyped_storage()) for each in made.tokens.values()]
    read, held = reading(), made.tokens["key"].pages[0]
    made.reorder(torch.tensor([1, 0, 1, 1]))
    assert not before[0].expired(), "a view of it is held here"
    del held
    assert all(each.expired() for each in before)
    assert reading() == read
