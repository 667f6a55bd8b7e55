"""Every method equals its formula, in a padded batch of ragged rows and row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from methods import CASES, G64, G80, ORACLES, PUBLISHED
from oracles import causal
from sequences import TOLERANCES, Geometry, assert_steps, decode, draw, make, maps, prefill

from kvcal.runtime.attention import SoftmaxSpec

FORMULAS = [(method, *formula) for method, case in CASES.items() for formula in case.formulas]


def spec_of(kind: str, geometry: Geometry) -> SoftmaxSpec:
    sinks = torch.linspace(-2, 3, geometry.heads) if kind == "sinks" else None
    return SoftmaxSpec(geometry.scaling, softcap=10.0 if kind == "softcap" else None, sink_logits=sinks)


def name(value: Any) -> str:
    if isinstance(value, Geometry):
        return f"D{value.dim}-G{value.group}"
    return ",".join(f"{key}={entry}" for key, entry in value.items()) if isinstance(value, dict) else str(value)


@pytest.mark.parametrize(("method", "geometry", "prompts", "steps", "kind", "settings"), FORMULAS, ids=name)
def test_padded_batch(
    method: str, geometry: Geometry, prompts: tuple[int, ...], steps: int, kind: str, settings: dict[str, Any]
) -> None:
    settings = {**PUBLISHED[method], **settings}
    rows, spec = draw(geometry, prompts, steps), spec_of(kind, geometry)
    store = make(method, geometry, **settings)
    prefill(store, rows, spec)
    taken = decode(store, rows, spec)
    assert store.lengths == [prompt + steps for prompt in prompts]
    for row, got in zip(rows, taken, strict=True):
        assert_steps(got, ORACLES[method](row, spec, **with_maps(method, geometry, settings)))


@pytest.mark.parametrize(
    ("prompt", "dtype"), [(1, torch.float64), (63, torch.float64), (100, torch.float64), (2000, torch.float32)], ids=str
)
@pytest.mark.parametrize("method", ORACLES)
def test_row_alone(method: str, prompt: int, dtype: torch.dtype) -> None:
    geometry, spec = Geometry(64, 32, 1, 2), SoftmaxSpec(0.125)
    (row,) = draw(geometry, [prompt], 3, seed=prompt, dtype=dtype)
    settings = PUBLISHED[method]
    store = make(method, geometry, **settings)
    prefill(store, [row], spec)
    (got,) = decode(store, [row], spec)
    assert_steps(got, ORACLES[method](row, spec, **with_maps(method, geometry, settings)), dtype)


@pytest.mark.parametrize("method", ["full", "exact_topk", "streaming", "h2o", "snapkv"])
def test_half_precision_where_nothing_is_approximated(method: str) -> None:
    """Sharp attention, where logits rounded to bfloat16 would show."""
    (row,), spec = draw(G64, [200], 4, dtype=torch.bfloat16), SoftmaxSpec(3 / 8)
    store = make(method, G64, **PUBLISHED[method])
    prefill(store, [row], spec)
    assert_steps(decode(store, [row], spec)[0], ORACLES[method](row, spec), torch.bfloat16)


@pytest.mark.parametrize("kind", ["plain", "softcap", "sinks"])
@pytest.mark.parametrize("method", ORACLES)
def test_prefill_is_dense(method: str, kind: str) -> None:
    spec, rows = spec_of(kind, G80), draw(G80, [1, 9, 40], 0)
    outputs = prefill(make(method, G80), rows, spec)
    for row, output in zip(rows, outputs, strict=True):
        torch.testing.assert_close(output.double(), causal(row, spec), **TOLERANCES[torch.float32])


def test_fractions_mean_what_is_written() -> None:
    # 0.07 · 100 and 0.55 · 100 are a little more than 7 and 55 in floating point.
    for keep, tokens, expected in ((0.07, 100, 7), (0.55, 100, 55), (0.25, 101, 26), (1.0, 7, 7), (0.001, 5, 1)):
        rows = draw(G64, [tokens - 1], 1)
        store = make("exact_topk", G64, keep=keep)
        prefill(store, rows, SoftmaxSpec(0.125))
        (((step),),) = decode(store, rows, SoftmaxSpec(0.125))
        assert step.read.sum(1).tolist() == [expected] * G64.heads


def with_maps(method: str, geometry: Geometry, settings: dict[str, Any]) -> dict[str, Any]:
    if method != "loki":
        return settings
    rank = settings["rank"]
    rank = rank if isinstance(rank, int) else int(rank * geometry.dim)
    query_map, key_map = maps(geometry, settings["basis"], rank)
    return {**settings, "query_map": query_map[:, :rank], "key_map": key_map[:, :rank]}
