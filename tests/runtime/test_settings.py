"""From what a user writes to one method per layer, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import samples

from kvcal.artifacts import KvcalError
from kvcal.runtime.methods import METHODS
from kvcal.runtime.methods.exact_topk import ExactTopk
from kvcal.runtime.methods.full import Full
from kvcal.runtime.methods.h2o import H2O
from kvcal.runtime.methods.loki import Loki
from kvcal.runtime.methods.quest import Quest
from kvcal.runtime.methods.streaming import Streaming
from kvcal.runtime.settings import builders, describe, methods_by_layer

LAYERS = range(4)
KEEPING = ("loki", "exact_topk", "quest", "sparq", "streaming", "h2o")


DEFAULTS: dict[str, dict[str, Any]] = {
    "full": {},
    "loki": {
        "rank": 0.25, "keep": 0.25, "basis": "score", "stage": "post", "select": "group", "choice": "exact",
        "sample": 1024, "sinks": 1, "recent": 16,
    },
    "exact_topk": {"keep": 0.25, "select": "group"},
    "quest": {"keep": 0.25, "page": 16, "select": "group", "sinks": 1, "recent": 0},
    "sparq": {"rank": 0.25, "keep": 0.25, "select": "group"},
    "streaming": {"keep": 0.25, "sinks": 4},
    "h2o": {"keep": 0.25},
    "snapkv": {"keep": 0.25, "window": 32, "kernel": 5, "pooling": "avg"},
    "clusterkv": {
        "keep": 1024, "select": "group", "tokens_per_cluster": 16, "window": 320, "sinks": 16, "tail": False,
        "segment": 8192, "iterations": 20, "offload": "none", "cached": 2048,
    },
    "spectral": {
        "keep": 0.0625, "select": "group", "rank": 0.5, "bits": 2, "rows": 16, "sinks": 1, "recent": 16,
        "residual": True, "choice": "sampled", "sample": 1024, "offload": "none", "cached": 2048,
    },
    "subgen": {"window": 288, "sinks": 4, "clusters": 64, "t": 4, "s": 96, "normaliser": "values"},
    "xcla": {"recent": 16},
}  # fmt: skip
"""What was chosen by measurements: docs/results/real.md."""


def planned(method: Any, **settings: Any) -> list[Any]:
    return list(methods_by_layer(method, settings, LAYERS, 4).values())


def test_one_value_for_all() -> None:
    assert planned("loki", rank=0.5, keep=64) == [Loki(rank=0.5, keep=64)] * 4
    assert planned("full") == [Full()] * 4
    for method, kind in METHODS.items():
        assert planned(method) == [kind()] * 4


def test_defaults_are_those_that_were_chosen() -> None:
    assert DEFAULTS.keys() == METHODS.keys()
    for method, expected in DEFAULTS.items():
        made = dataclasses.asdict(METHODS[method]())
        assert {name: made.get(name) for name in expected} == expected, method


def test_layers_that_share_take_the_basis_that_they_can_have() -> None:
    """The score basis is of one layer's queries; who asks for it is told so where the groups are known."""

    def sharing(method: Any, **settings: Any) -> list[Any]:
        return list(methods_by_layer(method, settings, LAYERS, 4, keys_are_shared=True).values())

    assert sharing("loki") == [Loki(basis="pca")] * 4
    assert sharing({"0-1": "full", "2-": "loki"}) == [Full(), Full(), Loki(basis="pca"), Loki(basis="pca")]
    assert sharing("loki", dense_layers=3) == [Full(), Full(), Full(), Loki(basis="pca")]
    for given in ({"method": "loki", "basis": "score"}, {"0-": {"method": "loki", "basis": "score"}}):
        assert sharing(given) == [Loki(basis="score")] * 4
    assert sharing("loki", basis=["pca", "pca", "score", "score"])[1:3] == [Loki(basis="pca"), Loki(basis="score")]
    for method in METHODS.keys() - {"loki"}:
        assert sharing(method) == planned(method)


def test_lists_and_ranges() -> None:
    by_rank = [Loki(rank=rank) for rank in (8, 4, 4, 2)]
    assert planned("loki", rank=[8, 4, 4, 2]) == by_rank
    assert planned("loki", rank=(8, 4, 4, 2)) == by_rank
    assert planned("loki", rank={"0": 8, "1-2": 4, "3": 2}) == by_rank
    assert planned("loki", rank={"3-": 2, "0": 8, "1-2": 4}) == by_rank
    assert planned("loki", rank={0: 8, 1: 4, 2: 4, 3: 2}) == by_rank
    assert planned("loki", rank={"0-": 4}) == [Loki(rank=4)] * 4
    assert planned("loki", select={"0-1": "head", "2-": "group"}, keep=[1, 2, 3, 4]) == [
        Loki(keep=1, select="head"), Loki(keep=2, select="head"),
        Loki(keep=3, select="group"), Loki(keep=4, select="group"),
    ]  # fmt: skip


def test_methods_by_layer() -> None:
    mixed = [Full(), Full(), Loki(rank=0.5), Loki(rank=0.5)]
    assert planned({"0-1": "full", "2-": "loki"}, rank=0.5) == mixed
    assert planned(["full", "full", "loki", "loki"], rank=0.5) == mixed
    assert planned({"0-1": "full", "2-": {"method": "loki", "rank": 0.5}}) == mixed
    assert planned({"0-1": "full", "2-": {"rank": 0.5}}) == mixed  # the default method
    # What all share goes to those that know it, and what a layer says itself comes first.
    assert planned({"0": "quest", "1": {"method": "loki", "keep": 7}, "2": "h2o", "3": "streaming"}, keep=0.5) == [
        Quest(keep=0.5), Loki(keep=7), H2O(keep=0.5), Streaming(keep=0.5)
    ]  # fmt: skip
    assert planned({"method": "quest", "page": 8}) == [Quest(page=8)] * 4


def test_dense_layers() -> None:
    assert planned("exact_topk", keep=3, dense_layers=2) == [Full(), Full(), ExactTopk(keep=3), ExactTopk(keep=3)]
    assert planned("exact_topk", keep=3, dense_layers=4) == [Full()] * 4
    assert planned("exact_topk", keep=3, dense_layers=0) == [ExactTopk(keep=3)] * 4


def test_layers_that_are_not_compressed_need_no_value() -> None:
    """Sliding-window layers: 0 and 2 here."""
    assert methods_by_layer("loki", {"rank": {"1": 4, "3": 8}}, [1, 3], 4) == {1: Loki(rank=4), 3: Loki(rank=8)}
    assert methods_by_layer("loki", {"rank": [1, 4, 1, 8]}, [1, 3], 4) == {1: Loki(rank=4), 3: Loki(rank=8)}
    assert methods_by_layer("loki", {"keep": 3, "dense_layers": 2}, [1, 3], 4) == {1: Full(), 3: Loki(keep=3)}
    assert methods_by_layer("loki", {"keep": 3}, [], 4) == {}


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("lokki", {}, r"unknown method 'lokki': did you mean loki\? there are full, spectral, loki, .*h2o"),
        ("", {}, "unknown method '': there are full"),
        (None, {}, "unknown method None: "),
        (7, {}, "unknown method 7: "),
        ({"0-": {"method": ["loki"]}}, {}, "unknown method "),
        ({"0-1": "full", "2-": "nope"}, {}, "unknown method 'nope'"),
        ("loki", {"ranks": 0.5}, "loki has no parameter 'ranks': there are .*rank.*dense_layers"),
        ("streaming", {"rank": 0.5}, "streaming has no parameter 'rank'"),
        ("full", {"keep": 0.5}, "full has no parameter 'keep'"),
        ({"0-1": "full", "2-": {"method": "quest", "rank": 3}}, {}, "quest has no parameter 'rank'"),
        ({"0-1": "full", "2-": "h2o"}, {"rank": 3}, "full, h2o has no parameter 'rank'"),
        ("loki", {"rank": {"0-2": 1, "2-": 2}}, "rank: layer 2 has two values .*'2-'"),
        ("loki", {"rank": {"0-1": 1, "3": 2}}, r"rank: no value for layers \[2\]"),
        ("loki", {"rank": {}}, r"rank: no value for layers \[0, 1, 2, 3\]"),
        ({"0-1": "full"}, {}, r"method: no value for layers \[2, 3\]"),
        ("loki", {"rank": {"0-4": 1}}, "rank: layers '0-4': this model has layers 0 to 3"),
        ("loki", {"rank": {"0-3": 1, "4-": 1}}, "rank: layers '4-': this model has layers 0 to 3"),
        ("loki", {"rank": {"0-": 1, "9": 1}}, "rank: layers '9': this model has layers 0 to 3"),
        ("loki", {"rank": {"2-1": 1}}, "rank: layers '2-1'"),
        ("loki", {"rank": {"first": 1}}, "rank: layers 'first': give them as "),
        ("loki", {"rank": {"-1": 1}}, "rank: layers '-1': give them as "),
        ({"0-1": "full", "two": "loki"}, {}, "method: layers 'two': give them as "),
        ("loki", {"rank": [1, 2, 3]}, "rank: a list of 3 values for a model of 4 layers"),
        (["loki"] * 5, {}, "method: a list of 5 values for a model of 4 layers"),
        ("loki", {"dense_layers": 5}, "dense_layers 5: give a whole number from 0 to 4"),
        ("loki", {"dense_layers": -1}, "dense_layers -1: "),
        ("loki", {"dense_layers": True}, "dense_layers True: "),
        ("loki", {"dense_layers": 0.5}, "dense_layers 0.5: "),
    ],
    ids=str,
)
def test_refused_by_plan(method: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(KvcalError, match=f"^{message}[^\n]*$"):
        builders(methods_by_layer(method, settings, LAYERS, 4), [8] * 4, samples.artifact(layers=4, head_dim=8))


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        *((method, {"keep": 0}, f"{method}, layer 0: keep 0: give a fraction above 0") for method in KEEPING),
        ("loki", {"keep": -3}, "loki, layer 0: keep -3: "),
        ("loki", {"keep": 0.0}, "loki, layer 0: keep 0.0: "),
        ("loki", {"keep": 1.5}, "loki, layer 0: keep 1.5: a fraction is at most 1.0"),
        ("loki", {"keep": float("nan")}, "loki, layer 0: keep nan: "),
        ("loki", {"keep": float("inf")}, "loki, layer 0: keep inf: "),
        ("loki", {"keep": True}, "loki, layer 0: keep True: "),
        ("loki", {"keep": "0.5"}, "loki, layer 0: keep '0.5': "),
        ("loki", {"keep": None}, "loki, layer 0: keep None: "),
        ("h2o", {"keep": [0.5, 0.5, 2.0, 0.5]}, "h2o, layer 2: keep 2.0: "),
        ("loki", {"rank": 9}, "loki, layer 0: rank 9 is above the head dim 8"),
        ("loki", {"rank": [8, 8, 8, 9]}, "loki, layer 3: rank 9 is above the head dim 8"),
        ("sparq", {"rank": 9}, "sparq, layer 0: rank 9 is above the head dim 8"),
        ("sparq", {"rank": "variance:0.9"}, "sparq, layer 0: rank 'variance:0.9': "),
        ("loki", {"rank": "half"}, "loki, layer 0: rank 'half': "),
        ("loki", {"stage": "before"}, "loki, layer 0: stage 'before': give pre or post"),
        ("loki", {"basis": ["pca", "svd", "pca", "pca"]}, "loki, layer 1: basis 'svd': give pca or score"),
        ("loki", {"select": 3}, "loki, layer 0: select 3: give head or group"),
        ("loki", {"dense_below": -1}, "loki, layer 0: dense_below -1: "),
        ("loki", {"dense_below": 1.5}, "loki, layer 0: dense_below 1.5: "),
        ("quest", {"page": 0}, "quest, layer 0: page 0: "),
        ("quest", {"page": True}, "quest, layer 0: page True: "),
        ("streaming", {"sinks": -1}, "streaming, layer 0: sinks -1: "),
        ("streaming", {"sinks": "4"}, "streaming, layer 0: sinks '4': "),
        ("full", {"record_mass": "yes"}, "full, layer 0: record_mass 'yes': "),
    ],
    ids=str,
)
def test_refused_by_builders(method: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(KvcalError, match=f"^{message}[^\n]*$"):
        builders(methods_by_layer(method, settings, LAYERS, 4), [8] * 4, samples.artifact(layers=4, head_dim=8))


def test_artifact_and_stages() -> None:
    artifact = samples.artifact(layers=4, head_dim=8)
    with pytest.raises(KvcalError, match=r"^loki, layer 2: loki needs an artifact: [^\n]*calibrate pca[^\n]*$"):
        builders(methods_by_layer({"0-1": "full", "2-": "loki"}, {}, LAYERS, 4), [8] * 4, None)
    for stage, basis in (("pca", "pca"), ("score", "score")):
        without = dataclasses.replace(artifact, stages={k: v for k, v in artifact.stages.items() if k != stage})
        with pytest.raises(KvcalError, match=f"^loki, layer 0: [^\n]*no stage '{stage}'[^\n]*$"):
            builders(methods_by_layer("loki", {"basis": basis}, LAYERS, 4), [8] * 4, without)
    with pytest.raises(KvcalError, match=r"^loki, layer 2: [^\n]*no layer 2, it has 2[^\n]*$"):
        builders(methods_by_layer("loki", {}, LAYERS, 4), [8] * 4, samples.artifact(layers=2, head_dim=8))
    for method in ("full", *(name for name in KEEPING if name != "loki")):
        assert builders(methods_by_layer(method, {}, LAYERS, 4), [8] * 4, None).keys() == set(LAYERS)


def test_builders_make_empty_stores_of_their_own() -> None:
    made = builders(
        methods_by_layer("loki", {"basis": "pca", "rank": [8, 4, 2, 1]}, LAYERS, 4),
        [8] * 4,
        samples.artifact(layers=4, head_dim=8),
    )
    assert [made[layer]().policy.basis.rank for layer in LAYERS] == [8, 4, 2, 1]
    first, second = made[0](), made[0]()
    assert first is not second and first.lengths == [] and first.resident_bytes() == 0
    assert first.policy is second.policy  # the artifact's tensors are shared


def test_describe_joins_neighbours() -> None:
    chosen = methods_by_layer({"0-1": "full", "2-": "h2o"}, {"keep": {"0-2": 0.5, "3": 9}}, LAYERS, 4)
    assert describe(chosen) == [
        {"layers": "0-1", "method": "full", "record_mass": False, "record_queries": 0},
        {"layers": "2-2", "method": "h2o", "keep": 0.5, "dense_below": 0},
        {"layers": "3-3", "method": "h2o", "keep": 9, "dense_below": 0},
    ]
    assert [run["layers"] for run in describe(methods_by_layer("h2o", {}, [0, 1, 3], 4))] == ["0-1", "3-3"]
