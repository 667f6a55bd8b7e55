"""ClusterKV's tail equals its formula, and what it promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle_clusters import clustering_of, decode_checked, whole_clusters
from oracle_heads import heads_at
from oracles import full
from sequences import TOLERANCES, Geometry, Row, assert_steps, decode, draw, make, prefill

from kvcal.artifacts import KvcalError
from kvcal.runtime.attention import SoftmaxSpec
from kvcal.runtime.methods.clusterkv import ClusterKV
from kvcal.runtime.store import Store

G80, SMALL = Geometry(80, 48, 2, 4), Geometry(16, 8, 2, 3)
PLAIN = SoftmaxSpec(0.25)
RAGGED = (1, 15, 63, 100)
TAIL = {"tail": True, "tokens_per_cluster": 6, "window": 3, "sinks": 3}


def built(geometry: Geometry, rows: list[Row], spec: SoftmaxSpec, **more: Any) -> tuple[Store, dict[str, Any]]:
    """(store after the prompts, its settings)"""
    settings = {**TAIL, **more}
    store = make("clusterkv", geometry, **settings)
    assert isinstance(store, Store)
    prefill(store, rows, spec)
    return store, settings


@pytest.mark.parametrize("kind", ["plain", "softcap", "sinks"])
@pytest.mark.parametrize("select", ["head", "group"])
def test_equals_the_formula(select: str, kind: str) -> None:
    """A padded batch of ragged rows; the window closes twice, once as soon as the first token comes."""
    sinks = torch.linspace(-2, 3, G80.heads) if kind == "sinks" else None
    spec = SoftmaxSpec(G80.scaling, softcap=10.0 if kind == "softcap" else None, sink_logits=sinks)
    rows = draw(G80, RAGGED, 5)
    store, settings = built(G80, rows, spec, keep=0.3, select=select)
    decode_checked(store, rows, spec, whole_clusters, settings, range(5))


@pytest.mark.parametrize("keep", [1, 9, 40], ids=str)
def test_equals_the_formula_for_any_count(keep: int) -> None:
    """Budgets that sinks and window exceed, and that some rows' tokens do not."""
    rows = draw(SMALL, (8, 37, 90), 4)
    store, settings = built(SMALL, rows, PLAIN, keep=keep, dense_below=12)
    decode_checked(store, rows, PLAIN, whole_clusters, settings, range(4))


@pytest.mark.parametrize("sinks", [0, 3, 15, 31])
def test_a_row_that_is_read_whole_beside_one_that_is_not(sinks: int) -> None:
    rows = draw(SMALL, (40, 90), 6)
    store, _ = built(SMALL, rows, PLAIN, keep=0.2, dense_below=60, sinks=sinks, window=2)
    short, long = decode(store, rows, PLAIN)
    assert_steps(short, full(rows[0], PLAIN))
    assert not any(step.read.all() for step in long)


@pytest.mark.parametrize("whole", [{"keep": 1.0}, {"keep": 200}, {"dense_below": 200}], ids=str)
def test_nothing_is_left_for_the_tail_where_all_is_read(whole: dict[str, Any]) -> None:
    rows = draw(SMALL, (1, 40, 90), 5)
    store, _ = built(SMALL, rows, PLAIN, **whole)
    for row, got in zip(rows, decode(store, rows, PLAIN), strict=True):
        assert_steps(got, full(row, PLAIN))


@pytest.mark.parametrize("select", ["head", "group"])
def test_exact_where_keys_of_a_cluster_are_the_same(select: str) -> None:
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
    store, _ = built(SMALL, [row], PLAIN, keep=0.3, select=select, tokens_per_cluster=4, window=10)
    (got,) = decode(store, [row], PLAIN)
    for head in range(SMALL.kv_heads):
        assert all(len(set(kind[of].tolist())) <= 1 for of in clustering_of(store, 0, head).members)
    for step, want in zip(got, full(row, PLAIN), strict=True):
        assert not step.read.all()
        torch.testing.assert_close(step.output.double(), want.output, **TOLERANCES[torch.float32])


def test_sinks_and_the_open_window_are_always_read() -> None:
    """Queries that prefer everything else."""
    (row,) = draw(SMALL, [60], 9)
    key = row.key.clone()
    key[:, :5] = key[:, 60:] = -row.query.unflatten(0, (2, 3))[:, :, 60:].mean((1, 2)).unsqueeze(1) * 5
    row = Row(row.query, key, row.value, 60)
    store, _ = built(SMALL, [row], PLAIN, keep=0.3, sinks=5, window=4)
    (got,) = decode(store, [row], PLAIN)
    for number, step in enumerate(got):
        assert step.read[:, :5].all() and step.read[:, 60 + number // 4 * 4 :].all()


def test_large_logits_of_16_bit_keys() -> None:
    """Logits of a hundred keep their digits: float32 products of what is stored, as without a tail."""
    geometry = Geometry(64, 64, 2, 2)
    (row,) = draw(geometry, [90], 1, dtype=torch.bfloat16)
    spec = SoftmaxSpec(4.0)
    store, _ = built(geometry, [row], spec, keep=85)
    ((step,),) = decode(store, [row], spec)
    (expected,) = full(row.double(), spec)
    unread = ~step.read
    mass = [
        head.softmax(head.logit(head.key @ head.query))[unread[head.index]].sum()
        for kv_head in range(geometry.kv_heads)
        for head in heads_at(row.double(), spec, kv_head, 91)
    ]
    kept = torch.stack(mass) < 1e-4  # heads whose softmax lies on what was read
    assert kept.any()
    torch.testing.assert_close(step.output[kept].double(), expected.output[kept], rtol=1e-2, atol=1e-2)


def test_it_is_nearer_to_dense_attention_than_none() -> None:
    """On attention that is spread out, where most is not read."""
    rows = [Row(row.query * 0.3, *row.tensors()[1:], row.prompt) for row in draw(SMALL, (200, 300), 3)]
    errors = []
    for tail in (False, True):
        store = make("clusterkv", SMALL, **{**TAIL, "tail": tail, "keep": 0.2})
        prefill(store, rows, PLAIN)
        error = torch.tensor(0.0).double()
        for row, got in zip(rows, decode(store, rows, PLAIN), strict=True):
            for step, want in zip(got, full(row, PLAIN), strict=True):
                error += (step.output.double() - want.output).norm(dim=-1).mean()
        errors.append(error)
    assert errors[1] < 0.5 * errors[0]


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
def test_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(KvcalError, match=f"^{message}$"):
        ClusterKV(**settings).bind(0, 16, None)
