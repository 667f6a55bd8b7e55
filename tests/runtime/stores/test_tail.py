"""The tail equals its formula for every method that can have one, and what it promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle_clusters import Rule, best_pages, best_tokens, clustering_of, decode_checked, whole_clusters
from oracle_heads import Head, heads_at
from oracles import full
from sequences import TOLERANCES, Geometry, Row, assert_steps, decode, draw, make, maps, prefill
from torch import Tensor

from kvcal.artifacts import KvcalError
from kvcal.runtime.attention import Logits
from kvcal.runtime.stores import METHODS
from kvcal.runtime.stores.clustered import ClusteredStore

G80, SMALL = Geometry(80, 48, 2, 4), Geometry(16, 8, 2, 3)
PLAIN = Logits(0.25)
RAGGED = (1, 15, 63, 100)
TAIL = {"tail": True, "tokens_per_cluster": 6, "window": 3, "sinks": 3}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "exact_topk": ("exact_topk", {"select": "head"}),
    "loki-pca": ("loki", {"rank": 4, "basis": "pca", "select": "head"}),
    "loki-score": ("loki", {"rank": 5, "basis": "score", "select": "head"}),
    "quest": ("quest", {"page": 4, "select": "head"}),
    "quest-16": ("quest", {"page": 16, "select": "head"}),
    "clusterkv": ("clusterkv", {}),
}


def rule_of(method: str, geometry: Geometry, settings: dict[str, Any]) -> Rule:
    if method == "clusterkv":
        return whole_clusters
    if method == "quest":
        return best_pages(settings["page"])
    if method == "exact_topk":
        return best_tokens(lambda head: head.logit(head.key @ head.query))
    rank = settings["rank"]
    to_query, to_key = (each[:, :rank].double() for each in maps(geometry, settings["basis"], rank))

    def approximate(head: Head) -> Tensor:
        of = head.index // geometry.group
        return head.logit((head.key @ to_key[of].T) @ (to_query[of] @ head.query))

    return best_tokens(approximate)


def built(
    case: str, geometry: Geometry, rows: list[Row], logits: Logits, **more: Any
) -> tuple[ClusteredStore, Rule, dict[str, Any]]:
    """(store after the prompts, its rule, its settings)"""
    method, settings = CASES[case]
    settings = {**settings, **TAIL, **more}
    store = make(method, geometry, **settings)
    assert isinstance(store, ClusteredStore)
    prefill(store, rows, logits)
    return store, rule_of(method, geometry, settings), settings


@pytest.mark.parametrize("kind", ["plain", "softcap", "sinks"])
@pytest.mark.parametrize("select", ["head", "group"])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_formula(case: str, select: str, kind: str) -> None:
    """A padded batch of ragged rows; the window closes twice, once as soon as the first token comes."""
    sinks = torch.linspace(-2, 3, G80.heads) if kind == "sinks" else None
    logits = Logits(G80.scaling, softcap=10.0 if kind == "softcap" else None, sinks=sinks)
    rows = draw(G80, RAGGED, 5)
    store, rule, settings = built(case, G80, rows, logits, keep=0.3, select=select)
    decode_checked(store, rows, logits, rule, settings, range(5))


@pytest.mark.parametrize("keep", [1, 9, 40], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_formula_for_any_count(case: str, keep: int) -> None:
    """Budgets that sinks and window exceed, and that some rows' tokens do not."""
    rows = draw(SMALL, (8, 37, 90), 4)
    store, rule, settings = built(case, SMALL, rows, PLAIN, keep=keep, dense_below=12)
    decode_checked(store, rows, PLAIN, rule, settings, range(4))


@pytest.mark.parametrize("sinks", [0, 3, 15, 31])
@pytest.mark.parametrize("case", CASES)
def test_a_row_that_is_read_whole_beside_one_that_is_not(case: str, sinks: int) -> None:
    rows = draw(SMALL, (40, 90), 6)
    store, _, _ = built(case, SMALL, rows, PLAIN, keep=0.2, dense_below=60, sinks=sinks, window=2)
    short, long = decode(store, rows, PLAIN)
    assert_steps(short, full(rows[0], PLAIN))
    assert not any(step.read.all() for step in long)


@pytest.mark.parametrize("whole", [{"keep": 1.0}, {"keep": 200}, {"dense_below": 200}], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_nothing_is_left_for_the_tail_where_all_is_read(case: str, whole: dict[str, Any]) -> None:
    rows = draw(SMALL, (1, 40, 90), 5)
    store, _, _ = built(case, SMALL, rows, PLAIN, **whole)
    for row, got in zip(rows, decode(store, rows, PLAIN), strict=True):
        assert_steps(got, full(row, PLAIN))


@pytest.mark.parametrize("select", ["head", "group"])
@pytest.mark.parametrize("case", CASES)
def test_exact_where_keys_of_a_cluster_are_the_same(case: str, select: str) -> None:
    """Twelve different tokens, eight times each, in twelve clusters or more: q·k̄ and v̄ are no estimates then. (Were
    only the keys alike, a cluster of which some tokens are read would still stand for the others with its mean value.)
    """
    generator = torch.Generator().manual_seed(1)
    kind = torch.arange(12).repeat(8)[torch.randperm(96, generator=generator)]
    (row,) = draw(SMALL, [96], 3)
    key, value = row.key.clone(), row.value.clone()
    for tensor in (key, value):
        tensor[:, :96] = tensor[:, :12][:, kind]
    row = Row(row.query, key, value, 96)
    store, _, _ = built(case, SMALL, [row], PLAIN, keep=0.3, select=select, tokens_per_cluster=4, window=10)
    (got,) = decode(store, [row], PLAIN)
    for head in range(SMALL.kv_heads):
        assert all(len(set(kind[of].tolist())) <= 1 for of in clustering_of(store, 0, head).members)
    for step, want in zip(got, full(row, PLAIN), strict=True):
        assert not step.read.all()
        torch.testing.assert_close(step.output.double(), want.output, **TOLERANCES[torch.float32])


@pytest.mark.parametrize("case", CASES)
def test_sinks_and_the_open_window_are_always_read(case: str) -> None:
    """Queries that prefer everything else."""
    (row,) = draw(SMALL, [60], 9)
    key = row.key.clone()
    key[:, :5] = key[:, 60:] = -row.query.unflatten(0, (2, 3))[:, :, 60:].mean((1, 2)).unsqueeze(1) * 5
    row = Row(row.query, key, row.value, 60)
    store, _, _ = built(case, SMALL, [row], PLAIN, keep=0.3, sinks=5, window=4)
    (got,) = decode(store, [row], PLAIN)
    for number, step in enumerate(got):
        assert step.read[:, :5].all() and step.read[:, 60 + number // 4 * 4 :].all()


@pytest.mark.parametrize("case", [case for case in CASES if case != "loki-pca"])  # rounds its rotated keys once more
def test_large_logits_of_16_bit_keys(case: str) -> None:
    """Logits of a hundred keep their digits: float32 products of what is stored, as without a tail."""
    geometry = Geometry(64, 64, 2, 2)
    (row,) = draw(geometry, [90], 1, dtype=torch.bfloat16)
    logits = Logits(4.0)
    store, _, _ = built(case, geometry, [row], logits, keep=85)
    ((step,),) = decode(store, [row], logits)
    (expected,) = full(row.double(), logits)
    unread = ~step.read
    mass = [
        head.softmax(head.logit(head.key @ head.query))[unread[head.index]].sum()
        for kv_head in range(geometry.kv_heads)
        for head in heads_at(row.double(), logits, kv_head, 91)
    ]
    kept = torch.stack(mass) < 1e-4  # heads whose softmax lies on what was read
    assert kept.any()
    torch.testing.assert_close(step.output[kept].double(), expected.output[kept], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("case", CASES)
def test_it_is_nearer_to_dense_attention_than_none(case: str) -> None:
    """On attention that is spread out, where most is not read."""
    rows = [Row(row.query * 0.3, *row.tensors()[1:], row.prompt) for row in draw(SMALL, (200, 300), 3)]
    method, settings = CASES[case]
    errors = []
    for tail in (False, True):
        store = make(method, SMALL, **{**settings, **TAIL, "tail": tail, "keep": 0.2})
        prefill(store, rows, PLAIN)
        error = torch.tensor(0.0).double()
        for row, got in zip(rows, decode(store, rows, PLAIN), strict=True):
            for step, want in zip(got, full(row, PLAIN), strict=True):
                error += (step.output.double() - want.output).norm(dim=-1).mean()
        errors.append(error)
    assert errors[1] < 0.5 * errors[0]


def test_parameters_of_the_tail_change_nothing_without_it() -> None:
    (row,) = draw(SMALL, [40], 3)
    for method, settings in (CASES[case] for case in CASES if case != "clusterkv"):
        plain = make(method, SMALL, **settings)
        other = make(method, SMALL, **settings, tokens_per_cluster=2, window=1, sinks=9)
        for store in (plain, other):
            prefill(store, [row], PLAIN)
        one, two = (decode(store, [row], PLAIN)[0] for store in (plain, other))
        assert all(
            torch.equal(a.output, b.output) and torch.equal(a.read, b.read) for a, b in zip(one, two, strict=True)
        )
        assert plain.resident_bytes() == other.resident_bytes()


def test_heads_at_one_step_share_their_clusters() -> None:
    """One clustering per KV head: what a store reads for the tail does not grow with the group."""
    (row,) = draw(SMALL, [60], 1)
    store, _, _ = built("exact_topk", SMALL, [row], PLAIN, keep=0.3)
    decode(store, [row], PLAIN)
    assert store.rows["cluster.key"].view.shape == (1, SMALL.kv_heads, 10, SMALL.dim)
    assert len(heads_at(row, PLAIN, 0, 61)) == SMALL.group


@pytest.mark.parametrize("method", [name for name, kind in METHODS.items() if hasattr(kind(), "tail")])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tail": "yes"}, "tail 'yes': give True or False"),
        ({"tokens_per_cluster": 0.5}, "tokens_per_cluster 0.5: give a whole number of at least 1"),
        ({"window": 0}, "window 0: give a whole number of at least 1"),
        ({"sinks": -1}, "sinks -1: give a whole number of at least 0"),
    ],
    ids=str,
)
def test_refused(method: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(KvcalError, match=f"^{message}$"):
        METHODS[method](**settings).build(0, 16, None)
