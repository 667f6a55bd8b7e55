"""ClusterKV equals its formula, given its clusters; where its clusters are, and when they are made."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from oracle_clusters import clustering_of, decode_checked, whole_clusters
from oracles import full
from sequences import Geometry, Row, assert_steps, decode, draw, make, padded, prefill

from kvcal.artifacts import KvcalError
from kvcal.runtime.attention import SoftmaxSpec
from kvcal.runtime.methods.clusterkv import ClusterKV

G64, G80, G128, G256 = (
    Geometry(64, 64, 2, 1),
    Geometry(80, 48, 2, 4),
    Geometry(128, 128, 1, 7),
    Geometry(256, 256, 1, 4),
)
SMALL, PLAIN = Geometry(16, 8, 2, 3), SoftmaxSpec(0.25)
RAGGED = (1, 15, 63, 100, 700)

CASES: list[tuple[Geometry, tuple[int, ...], int, dict[str, Any]]] = [
    (G64, RAGGED, 3, {"keep": 64, "tokens_per_cluster": 80}),
    (G64, RAGGED, 3, {"keep": 0.25, "select": "head", "sinks": 4, "tokens_per_cluster": 16, "tail": True}),
    (G80, RAGGED, 4, {"keep": 0.3, "window": 3, "tokens_per_cluster": 8, "sinks": 2}),
    (G128, RAGGED[:4], 4, {"keep": 30, "tokens_per_cluster": 5, "window": 2, "tail": True}),
    (G256, RAGGED[:4], 3, {"keep": 0.2, "tokens_per_cluster": 8, "sinks": 0, "select": "head"}),
    (SMALL, RAGGED[:4], 25, {"keep": 0.3, "tokens_per_cluster": 4, "window": 7, "sinks": 20, "segment": 30}),
    (SMALL, (40, 90), 4, {"keep": 1, "tokens_per_cluster": 4, "window": 2, "tail": True}),
    (SMALL, (40, 90), 4, {"keep": 0.3, "tokens_per_cluster": 4, "dense_below": 60, "sinks": 3}),
    (SMALL, (40, 90), 4, {"keep": 0.3, "tokens_per_cluster": 1, "sinks": 3}),
]


def name(value: Any) -> str:
    if isinstance(value, Geometry):
        return f"D{value.dim}-G{value.group}"
    return ",".join(f"{key}={entry}" for key, entry in value.items()) if isinstance(value, dict) else str(value)


@pytest.mark.parametrize("kind", ["plain", "softcap", "sinks"])
@pytest.mark.parametrize(("geometry", "prompts", "steps", "settings"), CASES, ids=name)
def test_padded_batch_equals_the_formula(
    geometry: Geometry, prompts: tuple[int, ...], steps: int, settings: dict[str, Any], kind: str
) -> None:
    if kind != "plain":
        prompts, steps = prompts[:4], min(steps, 3)
    model_sinks = torch.linspace(-2, 3, geometry.heads) if kind == "sinks" else None
    spec = SoftmaxSpec(geometry.scaling, softcap=10.0 if kind == "softcap" else None, sink_logits=model_sinks)
    rows = draw(geometry, prompts, steps)
    store = make("clusterkv", geometry, **settings)
    prefill(store, rows, spec)
    decode_checked(store, rows, spec, whole_clusters, settings, range(steps))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_row_alone_of_another_dtype(dtype: torch.dtype) -> None:
    settings = {"keep": 40, "tokens_per_cluster": 6, "sinks": 4, "window": 3}
    rows = draw(G64, [100], 5, dtype=dtype)
    store = make("clusterkv", G64, **settings)
    prefill(store, rows, SoftmaxSpec(0.125))
    if dtype == torch.float64:
        decode_checked(store, rows, SoftmaxSpec(0.125), whole_clusters, settings, range(5))
    else:  # its centroids are rounded, so that it may choose others: it reads the same number of tokens
        (steps,) = decode(store, rows, SoftmaxSpec(0.125))
        assert [step.read.sum(1).tolist() for step in steps] == [[40, 40]] * 5


@pytest.mark.parametrize("keep", [10**6, 110, 1.0], ids=str)
@pytest.mark.parametrize("tail", [False, True])
def test_budgets_above_the_sequence_are_full(keep: float, tail: bool) -> None:
    rows = draw(SMALL, (1, 15, 90), 9)
    store = make("clusterkv", SMALL, keep=keep, tail=tail, tokens_per_cluster=4, window=4, sinks=3)
    prefill(store, rows, PLAIN)
    for row, got in zip(rows, decode(store, rows, PLAIN), strict=True):
        assert_steps(got, full(row, PLAIN))


@pytest.mark.parametrize("prompts", [(1, 9, 40, 70), (40, 40)], ids=str)
def test_clusters_are_made_of_the_prompt_and_of_every_full_window(prompts: tuple[int, ...]) -> None:
    """Sinks stay out; ceil or floor of n / 5 clusters, at least one; what is open is exactly what came since.

    Sinks and window take no more than half of what is read.
    """
    sinks, window = 4, 6
    rows = draw(SMALL, prompts, 20)
    store = make("clusterkv", SMALL, keep=0.5, tokens_per_cluster=5, window=window, sinks=sinks)
    prefill(store, rows, PLAIN)
    assert all(not clustering_of(store, row, 0).members for row in range(len(rows)))  # not before it is needed
    for step in range(20):
        decode(store, rows, PLAIN, range(step, step + 1))
        for index, prompt in enumerate(prompts):
            done, count = 0, 0
            for tokens in range(prompt, prompt + step + 1):  # before the next token comes
                first = max(done, min(sinks, tokens))
                half = math.ceil(0.5 * tokens) // 2
                most = max(1, min(window, half - sinks))
                if tokens > first and (tokens == prompt or tokens - first == most):
                    count += max(1, round((tokens - first) / 5))
                    done = tokens
            for head in range(SMALL.kv_heads):
                found = clustering_of(store, index, head)
                assert len(found.members) == count and found.tokens == prompt + step + 1
                assert sum(map(len, found.members)) == max(0, done - sinks)


def test_clusters_are_alike_inside() -> None:
    """Tight bundles of keys are found where each has a token to begin with, and values go with their keys."""
    generator = torch.Generator().manual_seed(0)
    kind = torch.arange(6).repeat_interleave(40)
    middle = torch.randn(6, 16, generator=generator) * 3
    key = (middle[kind] + 0.05 * torch.randn(2, 240, 16, generator=generator))[:, :, :]
    value = kind.float()[None, :, None].expand(2, 240, 8).contiguous()
    query = torch.randn(6, 240, 16, generator=generator)
    row = Row(query, key, value, 239)
    store = make("clusterkv", SMALL, keep=0.2, tokens_per_cluster=39, sinks=0)
    prefill(store, [row], PLAIN)
    decode(store, [row], PLAIN)
    means = store.sequence_index.buffers["cluster.value"].view[0]  # type: ignore[attr-defined]
    assert means.shape[1] == 6
    torch.testing.assert_close(means, means.round(), rtol=0, atol=1e-5)  # one kind each
    for head in range(2):
        for cluster, members in enumerate(clustering_of(store, 0, head).members):  # type: ignore[arg-type]
            assert kind[members].unique().tolist() == [round(means[head, cluster, 0].item())]


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("cuts", [(7,), (1, 30, 88), tuple(range(1, 100, 9))], ids=["two", "ragged", "many"])
def test_chunked_prefill_makes_the_same_clusters(cuts: tuple[int, ...], tail: bool) -> None:
    """Bit for bit: clusters are made of what is stored, when the first token is decoded."""
    rows = draw(SMALL, (12, 100, 57), 8)
    stores = [make("clusterkv", SMALL, keep=0.3, tokens_per_cluster=5, window=3, tail=tail) for _ in range(2)]
    for store, at in zip(stores, ((), cuts), strict=True):
        prefill(store, rows, PLAIN, at)
    once, chunked = (decode(store, rows, PLAIN) for store in stores)
    for one, other in zip(once, chunked, strict=True):
        for first, second in zip(one, other, strict=True):
            assert torch.equal(first.output, second.output) and torch.equal(first.read, second.read)
    for tensor, state in stores[0].state().items():
        assert torch.equal(state, stores[1].state()[tensor]), tensor


def test_segments_are_clustered_by_themselves() -> None:
    """As if each had come as a turn of its own."""
    settings = {"keep": 0.3, "tokens_per_cluster": 5, "sinks": 3}
    rows = draw(SMALL, (83, 20), 2)
    store = make("clusterkv", SMALL, **settings, segment=25)
    prefill(store, rows, PLAIN)
    decode_checked(store, rows, PLAIN, whole_clusters, settings, range(2))
    for index, sizes in ((0, [25, 25, 25, 5]), (1, [17])):
        found = clustering_of(store, index, 0)  # type: ignore[arg-type]
        begin = 3
        members = [set(each.tolist()) for each in found.members]
        for size in sizes:
            segment = set(range(begin, begin + size))
            within = [each for each in members if each & segment]
            assert all(each <= segment for each in within) and set().union(*within) == segment
            assert len(within) <= max(1, round(size / 5))
            begin += size


def test_turns_are_clusters_of_their_own() -> None:
    """A second prompt, padded in the middle: clustered together with what was open before it."""
    settings = {"keep": 0.9, "tokens_per_cluster": 4, "sinks": 2, "window": 6}
    rows = draw(SMALL, (30, 12), 20)
    store = make("clusterkv", SMALL, **settings)
    prefill(store, rows, PLAIN)
    decode_checked(store, rows, PLAIN, whole_clusters, settings, range(4))
    turns = [
        Row(*(tensor[:, begin : begin + 5] for tensor in row.tensors()), 5)
        for row, begin in zip(rows, (34, 16), strict=True)
    ]
    turns[1] = Row(*(tensor[:, :2] for tensor in turns[1].tensors()), 2)
    (query, key, value), valid = padded(turns)
    store.prefill(query, key, value, PLAIN, valid)
    late = [Row(*row.tensors(), prompt) for row, prompt in zip(rows, (39, 18), strict=True)]
    decode_checked(store, late, PLAIN, whole_clusters, settings, range(8))
    assert store.sequence_index.upto == [45, 24]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0}, "keep 0: "),
        ({"tokens_per_cluster": 0}, "tokens_per_cluster 0: "),
        ({"window": 0}, "window 0: "),
        ({"sinks": -1}, "sinks -1: "),
        ({"segment": 0}, "segment 0: "),
        ({"iterations": 0}, "iterations 0: "),
        ({"cached": 0}, "cached 0: "),
        ({"tail": 1}, "tail 1: give True or False"),
        ({"offload": "disk"}, "offload 'disk': give none or cpu"),
        ({"select": "layer"}, "select 'layer': give head or group"),
    ],
    ids=str,
)
def test_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(KvcalError, match=f"^{message}[^\n]*$"):
        ClusterKV(**settings).bind(0, 16, None)
