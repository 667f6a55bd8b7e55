"""Every method equals its formula, in a padded batch of ragged rows and row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import ORACLES, PUBLISHED, causal
from sequences import TOLERANCES, Geometry, assert_steps, decode, draw, make, maps, prefill

from kvcal.runtime.attention import Logits

G64, G80, G128, G256 = (
    Geometry(64, 64, 2, 1),
    Geometry(80, 48, 2, 4),
    Geometry(128, 128, 1, 7),
    Geometry(256, 256, 1, 4),
)
SHORT, LONG = (1, 63, 100), (1, 63, 100, 2000)

CASES: list[tuple[str, Geometry, tuple[int, ...], int, str, dict[str, Any]]] = [
    ("full", G80, SHORT, 2, "sinks", {}),
    ("full", G64, LONG, 2, "plain", {}),
    ("loki", G64, LONG, 3, "plain", {"rank": 0.25, "keep": 0.25}),
    ("loki", G80, SHORT, 3, "plain", {"rank": 20, "keep": 24, "select": "group"}),
    ("loki", G128, SHORT, 3, "softcap", {"rank": 0.5, "keep": 0.1, "basis": "score", "select": "group"}),
    ("loki", G256, SHORT, 3, "sinks", {"rank": 0.125, "keep": 0.25, "basis": "score"}),
    ("loki", G80, SHORT, 3, "sinks", {"rank": 0.25, "keep": 0.25, "dense_below": 80}),
    ("exact_topk", G64, LONG, 3, "plain", {"keep": 0.25}),
    ("exact_topk", G80, SHORT, 3, "sinks", {"keep": 0.1, "select": "group"}),
    ("exact_topk", G80, SHORT, 3, "sinks", {"keep": 0.1, "select": "max"}),
    ("loki", G128, SHORT, 3, "softcap", {"rank": 0.5, "keep": 0.1, "select": "max"}),
    ("quest", G80, SHORT, 18, "plain", {"keep": 0.3, "select": "max"}),
    ("exact_topk", G128, SHORT, 3, "softcap", {"keep": 16}),
    ("exact_topk", G256, SHORT, 3, "plain", {"keep": 0.5, "select": "group", "dense_below": 66}),
    ("quest", G64, LONG, 18, "plain", {"keep": 0.25}),
    ("quest", G80, SHORT, 18, "sinks", {"keep": 0.3, "select": "group"}),
    ("quest", G128, SHORT, 6, "softcap", {"keep": 20, "page": 8, "select": "group"}),
    ("quest", G256, SHORT, 3, "plain", {"keep": 1, "page": 4, "dense_below": 64}),
    ("sparq", G64, LONG, 3, "plain", {"rank": 0.25, "keep": 0.25}),
    ("sparq", G80, SHORT, 3, "sinks", {"rank": 0.5, "keep": 0.25}),
    ("sparq", G128, SHORT, 3, "softcap", {"rank": 16, "keep": 0.25, "select": "group"}),
    ("sparq", G256, SHORT, 3, "sinks", {"rank": 0.25, "keep": 10, "select": "group", "dense_below": 80}),
    ("streaming", G64, LONG, 12, "plain", {"keep": 0.25}),
    ("streaming", G80, SHORT, 12, "sinks", {"keep": 0.1, "sinks": 2}),
    ("streaming", G128, SHORT, 12, "softcap", {"keep": 3, "sinks": 4}),
    ("streaming", G256, SHORT, 12, "plain", {"keep": 0.5, "sinks": 0, "dense_below": 70}),
    ("h2o", G64, LONG, 12, "plain", {"keep": 0.25}),
    ("h2o", G80, SHORT, 12, "sinks", {"keep": 0.1}),
    ("h2o", G128, SHORT, 12, "softcap", {"keep": 9}),
    ("h2o", G256, SHORT, 12, "plain", {"keep": 0.5, "dense_below": 70}),
    ("h2o", G80, SHORT, 6, "plain", {"keep": 1}),
    ("streaming", G80, SHORT, 6, "plain", {"keep": 1}),
]


def logits_of(kind: str, geometry: Geometry) -> Logits:
    sinks = torch.linspace(-2, 3, geometry.heads) if kind == "sinks" else None
    return Logits(geometry.scaling, softcap=10.0 if kind == "softcap" else None, sinks=sinks)


def name(value: Any) -> str:
    if isinstance(value, Geometry):
        return f"D{value.dim}-G{value.group}"
    return ",".join(f"{key}={entry}" for key, entry in value.items()) if isinstance(value, dict) else str(value)


@pytest.mark.parametrize(("method", "geometry", "prompts", "steps", "kind", "settings"), CASES, ids=name)
def test_padded_batch(
    method: str, geometry: Geometry, prompts: tuple[int, ...], steps: int, kind: str, settings: dict[str, Any]
) -> None:
    settings = {**PUBLISHED.get(method, {}), **settings}
    rows, logits = draw(geometry, prompts, steps), logits_of(kind, geometry)
    store = make(method, geometry, **settings)
    prefill(store, rows, logits)
    taken = decode(store, rows, logits)
    assert store.lengths == [prompt + steps for prompt in prompts]
    for row, got in zip(rows, taken, strict=True):
        assert_steps(got, ORACLES[method](row, logits, **with_maps(method, geometry, settings)))


@pytest.mark.parametrize(
    ("prompt", "dtype"), [(1, torch.float64), (63, torch.float64), (100, torch.float64), (2000, torch.float32)], ids=str
)
@pytest.mark.parametrize("method", ORACLES)
def test_row_alone(method: str, prompt: int, dtype: torch.dtype) -> None:
    geometry, logits = Geometry(64, 32, 1, 2), Logits(0.125)
    (row,) = draw(geometry, [prompt], 3, seed=prompt, dtype=dtype)
    settings = PUBLISHED.get(method, {})
    store = make(method, geometry, **settings)
    prefill(store, [row], logits)
    (got,) = decode(store, [row], logits)
    assert_steps(got, ORACLES[method](row, logits, **with_maps(method, geometry, settings)), dtype)


@pytest.mark.parametrize("method", ["full", "exact_topk", "streaming", "h2o"])
def test_half_precision_where_nothing_is_approximated(method: str) -> None:
    """Sharp attention, where logits rounded to bfloat16 would show."""
    (row,), logits = draw(G64, [200], 4, dtype=torch.bfloat16), Logits(3 / 8)
    store = make(method, G64, **PUBLISHED.get(method, {}))
    prefill(store, [row], logits)
    assert_steps(decode(store, [row], logits)[0], ORACLES[method](row, logits), torch.bfloat16)


@pytest.mark.parametrize("kind", ["plain", "softcap", "sinks"])
@pytest.mark.parametrize("method", ORACLES)
def test_prefill_is_dense(method: str, kind: str) -> None:
    logits, rows = logits_of(kind, G80), draw(G80, [1, 9, 40], 0)
    outputs = prefill(make(method, G80), rows, logits)
    for row, output in zip(rows, outputs, strict=True):
        torch.testing.assert_close(output.double(), causal(row, logits), **TOLERANCES[torch.float32])


def test_fractions_mean_what_is_written() -> None:
    # 0.07 · 100 and 0.55 · 100 are a little more than 7 and 55 in floating point.
    for keep, tokens, expected in ((0.07, 100, 7), (0.55, 100, 55), (0.25, 101, 26), (1.0, 7, 7), (0.001, 5, 1)):
        rows = draw(G64, [tokens - 1], 1)
        store = make("exact_topk", G64, keep=keep)
        prefill(store, rows, Logits(0.125))
        (((step),),) = decode(store, rows, Logits(0.125))
        assert step.read.sum(1).tolist() == [expected] * G64.heads


def with_maps(method: str, geometry: Geometry, settings: dict[str, Any]) -> dict[str, Any]:
    if method != "loki":
        return settings
    rank = settings["rank"]
    rank = rank if isinstance(rank, int) else int(rank * geometry.dim)
    query_map, key_map = maps(geometry, settings["basis"], rank)
    return {**settings, "query_map": query_map[:, :rank], "key_map": key_map[:, :rank]}
