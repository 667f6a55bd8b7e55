"""How much is read at the edges: rows without tokens, budgets that sinks exceed, counts that equal fractions."""

from __future__ import annotations

import pytest
import torch
from sequences import Geometry, decode, draw, make, prefill

from kvcal.runtime.attention import SoftmaxSpec

GEOMETRY, SPEC = Geometry(16, 8, 2, 3), SoftmaxSpec(0.25)
SELECTING = ("loki", "exact_topk", "quest", "sparq", "clusterkv")
SETTINGS = {
    "loki": {"rank": 0.5, "sinks": 0, "recent": 0},
    "quest": {"page": 4, "sinks": 0},
    "clusterkv": {"tokens_per_cluster": 4, "sinks": 2},
}


def counts(method: str, prompts: tuple[int, ...], **settings) -> list[int]:
    """Tokens that the first step reads of each row, per KV head."""
    rows = draw(GEOMETRY, prompts, 1)
    store = make(method, GEOMETRY, **{**SETTINGS.get(method, {}), **settings})
    prefill(store, rows, SPEC)
    decode(store, rows, SPEC)
    return store.read_mask().sum(-1)[:, 0].tolist()


@pytest.mark.parametrize("method", ["loki", "exact_topk", "sparq"])
def test_one_token_is_not_all_of_them(method):
    """keep=1 and keep=1.0 are equal, and what a step has reckoned for one cache serves others of the same lengths."""
    assert counts(method, (20,), keep=1.0) == [21]
    assert counts(method, (20,), keep=1) == [1]
    assert counts(method, (20,), keep=1.0) == [21]


@pytest.mark.parametrize("prompts", [(39,), (39, 39), (39, 38)], ids=str)
@pytest.mark.parametrize(("recent", "read"), [(0, 8), (5, 9)])
def test_sinks_beyond_the_budget_are_read_and_nothing_else(prompts, recent, read):
    """But the last token, where some of the last are always read."""
    assert counts("loki", prompts, keep=4, sinks=8, recent=recent) == [read] * len(prompts)


@pytest.mark.parametrize("method", SELECTING)
def test_a_row_without_tokens_beside_others(method):
    rows = draw(GEOMETRY, (30, 30), 2)
    store = make(method, GEOMETRY, **{**SETTINGS.get(method, {}), "keep": 0.3})
    query, key, value = (torch.stack([row.tensors()[of][:, :30] for row in rows]) for of in range(3))
    valid = torch.tensor([[False], [True]]).expand(-1, 30)
    store.prefill(query, key, value, SPEC, valid)
    query, key, value = (torch.stack([row.tensors()[of][:, 30:31] for row in rows]) for of in range(3))
    store.append(key, value, valid[:, :1])
    out = store.attend(query, SPEC)
    alone = make(method, GEOMETRY, **{**SETTINGS.get(method, {}), "keep": 0.3})
    prefill(alone, rows[1:], SPEC)
    ((step,),) = decode(alone, rows[1:], SPEC, range(1))
    torch.testing.assert_close(out[1, :, 0], step.output)


@pytest.mark.parametrize("change", ["reordered", "moved"])
def test_a_step_is_taken_again_after_the_batch_has_changed(change):
    rows = draw(GEOMETRY, (30, 44), 2)
    store = make("clusterkv", GEOMETRY, keep=0.4, **SETTINGS["clusterkv"])
    prefill(store, rows, SPEC)
    decode(store, rows, SPEC, range(1))
    query = torch.stack([row.query[:, row.prompt : row.prompt + 1] for row in rows])
    before = store.attend(query, SPEC)
    if change == "reordered":
        store.reorder(torch.tensor([1, 0]))
        before, query = before.flip(0), query.flip(0)
    else:
        store.to("cpu")
    torch.testing.assert_close(store.attend(query, SPEC), before)
