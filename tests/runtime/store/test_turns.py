"""A second prompt on a cache that has decoded: dense attention to all that is still held."""

from __future__ import annotations

import pytest
import torch
from methods import CLUSTERED, FORMS
from oracle_heads import heads_at
from sequences import TOLERANCES, Geometry, Row, alone, assert_steps, decode, draw, make, prefill

from kvcal.artifacts import KvcalError
from kvcal.runtime.attention import SoftmaxSpec

GEOMETRY = Geometry(16, 8, 2, 3)
SPEC = SoftmaxSpec(GEOMETRY.scaling)
START, TURN, END = 25, 12, 41
"""The row has 20 tokens of prompt and 5 decoded ones; then come 12 at once and 4 more."""


@pytest.mark.parametrize(
    "name", ["full", "loki-pca", "loki-score", "exact_topk", "quest", "sparq", "spectral", "spectral-head"]
)
def test_turns_are_one_prompt_where_everything_is_kept(name: str) -> None:
    method, settings = FORMS[name]
    (row,) = draw(GEOMETRY, [20], END - 20)
    store = make(method, GEOMETRY, **settings)
    prefill(store, [row], SPEC)
    decode(store, [row], SPEC, range(5))
    turn = store.prefill(*(tensor[None, :, START : START + TURN] for tensor in row.tensors()), SPEC)
    whole = make("full", GEOMETRY).prefill(*(tensor[None, :, : START + TURN] for tensor in row.tensors()), SPEC)
    torch.testing.assert_close(turn, whole[:, :, START:], **TOLERANCES[torch.float32])
    resumed = Row(*row.tensors(), prompt=START + TURN)
    assert_steps(decode(store, [resumed], SPEC)[0], alone(method, GEOMETRY, resumed, SPEC, **settings))


@pytest.mark.parametrize("name", CLUSTERED)
def test_a_turn_is_dense_whatever_was_clustered(name: str) -> None:
    """Three windows of decoded tokens were; rows lie in another order then."""
    method, settings = FORMS[name]
    rows = draw(GEOMETRY, (20, 9, 1), END - 20)
    store = make(method, GEOMETRY, **settings)
    prefill(store, rows, SPEC)
    decode(store, rows, SPEC, range(10))
    new = [torch.stack([row.tensors()[which][:, row.prompt + 10 :] for row in rows]) for which in range(3)]
    turn = store.prefill(*new, SPEC)
    for index, row in enumerate(rows):
        whole = make("full", GEOMETRY).prefill(*(tensor[None] for tensor in row.tensors()), SPEC)
        torch.testing.assert_close(turn[index], whole[0, :, row.prompt + 10 :], **TOLERANCES[torch.float32])


@pytest.mark.parametrize("method", ["streaming", "h2o"])
def test_a_turn_sees_what_was_not_evicted_and_itself(method: str) -> None:
    keep = 10
    (row,) = draw(GEOMETRY, [20], END - 20)
    store = make(method, GEOMETRY, keep=keep)
    prefill(store, [row], SPEC)
    last = decode(store, [row], SPEC, range(5))[0][-1]
    turn = store.prefill(*(tensor[None, :, START : START + TURN] for tensor in row.tensors()), SPEC)[0]
    for kv_head in range(GEOMETRY.kv_heads):
        for tokens in range(START + 1, START + TURN + 1):
            for head in heads_at(row.double(), SPEC, kv_head, tokens):
                held = last.read[head.index].nonzero().flatten()
                expected = head.attend(torch.cat((held, torch.arange(START, tokens))))
                got = turn[head.index, tokens - START - 1].double()
                torch.testing.assert_close(got, expected, **TOLERANCES[torch.float32])
    resumed = Row(*row.tensors(), prompt=START + TURN)
    for number, step in enumerate(decode(store, [resumed], SPEC)[0]):
        tokens = START + TURN + number + 1
        recent = set(range(tokens - keep // 2, tokens))
        for head in heads_at(row.double(), SPEC, 0, tokens) + heads_at(row.double(), SPEC, 1, tokens):
            read = step.read[head.index].nonzero().flatten()
            torch.testing.assert_close(step.output[head.index].double(), head.attend(read), **TOLERANCES[torch.float32])
            if method == "streaming":
                assert set(read.tolist()) == {0, 1, 2, 3} | set(range(tokens - keep + 4, tokens))
            else:
                assert len(read) == keep and recent <= set(read.tolist())
                evicted = ~last.read[head.index]
                assert not evicted[read[read < START]].any(), "came back"


def test_a_turn_of_snapkv_is_chosen_among_anew() -> None:
    """By its own last queries, of all that is held: the prompt's tokens that the first choice left, and all others."""
    (row,) = draw(GEOMETRY, [20], END - 20)
    settings = {"keep": 10, "window": 3, "kernel": 1}
    store = make("snapkv", GEOMETRY, **settings)
    prefill(store, [row], SPEC)
    last = decode(store, [row], SPEC, range(5))[0][-1]
    store.prefill(*(tensor[None, :, START : START + TURN] for tensor in row.tensors()), SPEC)
    resumed = Row(*row.tensors(), prompt=START + TURN)
    (step,) = decode(store, [resumed], SPEC, range(1))[0]
    for kv_head in range(GEOMETRY.kv_heads):
        first = GEOMETRY.group * kv_head
        held = [*last.read[first].nonzero().flatten().tolist(), *range(START, START + TURN)]
        received = dict.fromkeys(held, 0.0)
        for tokens in range(START + TURN - 2, START + TURN + 1):
            seen = [at for at in held if at < tokens]
            for head in heads_at(row.double(), SPEC, kv_head, tokens):
                for at, weight in zip(seen, head.weights(torch.tensor(seen)).tolist(), strict=True):
                    received[at] += weight
        before = held[:-3]
        best = sorted(before, key=lambda at: -received[at])[:7]
        read = set(step.read[first].nonzero().flatten().tolist())
        assert read == {*best, *held[-3:], START + TURN}


@pytest.mark.parametrize("name", FORMS)
def test_a_turn_of_another_batch_is_refused(name: str) -> None:
    method, settings = FORMS[name]
    rows = draw(GEOMETRY, (20, 9, 1), 1)
    store = make(method, GEOMETRY, **settings)
    prefill(store, rows[:2], SPEC)
    with pytest.raises(KvcalError, match="the cache holds 2 rows, got a batch of 3: begin a new cache"):
        prefill(store, rows, SPEC)
