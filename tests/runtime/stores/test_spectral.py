"""`spectral` equals its formula, given its clusters and its codes."""

from __future__ import annotations

from typing import Any

import coded
import pytest
import torch
from oracle_spectral import decode_checked
from oracles import full
from sequences import Geometry, Row, append, assert_steps, decode, draw, fork, make, padded, prefill

from kvcal.runtime.attention import Logits
from kvcal.runtime.stores.spectral import SpectralStore

G64, G80, G128, G256 = (
    Geometry(64, 64, 2, 1),
    Geometry(80, 48, 2, 4),
    Geometry(128, 128, 1, 2),
    Geometry(256, 256, 1, 4),
)
SMALL, PLAIN = Geometry(16, 8, 2, 2), Logits(0.25)
RAGGED = (1, 3, 15, 63, 200)
SPARSE = {"tokens_per_cluster": 5, "sinks": 2, "window": 4, "recent": 3}
DEEP = {**SPARSE, "flat_below": 0}

CASES: list[tuple[Geometry, tuple[int, ...], int, dict[str, Any]]] = [
    (G64, (*RAGGED, 500), 3, {"keep": 0.1}),
    (G64, RAGGED, 3, {"keep": 24, "basis": "pca", "bits": 4, "stage": "pre", "flat_below": 0, "select": "max"}),
    (G80, RAGGED, 3, {"keep": 0.2, "bits": 8, "rank": 16, **DEEP}),
    (G80, RAGGED[:4], 3, {"keep": 0.2, "select": "head", "rank": 0.3, **SPARSE}),
    (G128, RAGGED, 3, {"keep": 20, "bits": 4, "select": "head", "rank": "variance:0.9", "refine": 0.4, **DEEP}),
    (G256, RAGGED[:4], 2, {"keep": 0.3, "basis": "pca", "select": "max", "refine": 10, **DEEP}),
    (SMALL, RAGGED[:4], 18, {"keep": 0.3, "rank": 1.0, **DEEP}),
    (SMALL, RAGGED[:4], 6, {"keep": 0.3, "rank": 1.0, "tail": False, "select": "head", **DEEP}),
    (SMALL, RAGGED[:4], 6, {"keep": 0.3, "rank": 1.0, "tail": False, "basis": "pca", **SPARSE}),
    (SMALL, (5, 40, 90), 6, {"keep": 1, "rank": 1.0, **DEEP}),
    (SMALL, (5, 40, 90), 6, {"keep": 6, "rank": 1.0, **SPARSE, "sinks": 8}),
    (SMALL, (5, 40, 90), 6, {"keep": 0.3, "rank": 1.0, **SPARSE, "sinks": 0, "flat_below": 60, "refine": 7}),
    (SMALL, (5, 40, 90), 6, {"keep": 0.3, "rank": 1.0, **DEEP, "dense_below": 60}),
    (SMALL, (5, 40, 90), 6, {"keep": 0.9, "rank": 1.0, **DEEP, "refine": 1}),
    (SMALL, (5, 40, 90), 6, {"keep": 45, "rank": 1.0, **DEEP, "refine": 1.0, "recent": 40}),
    (SMALL, (9, 40), 6, {"keep": 0.3, "rank": 1.0, **DEEP, "tokens_per_cluster": 1, "clip": 0.5, "segment": 11}),
]


def name(value: Any) -> str:
    if isinstance(value, Geometry):
        return f"D{value.dim}-G{value.group}"
    return ",".join(f"{key}={entry}" for key, entry in value.items()) if isinstance(value, dict) else str(value)


def built(geometry: Geometry, settings: dict[str, Any]) -> SpectralStore:
    store = make("spectral", geometry, **settings)
    assert isinstance(store, SpectralStore)
    return store


def checked(store: SpectralStore, geometry: Geometry, rows: list[Row], steps: range, logits: Logits = PLAIN) -> None:
    decode_checked(store, rows, logits, coded.artifact(geometry.dim, geometry.kv_heads), steps)


@pytest.mark.parametrize(("geometry", "prompts", "steps", "settings"), CASES, ids=name)
def test_padded_batch_equals_the_formula(
    geometry: Geometry, prompts: tuple[int, ...], steps: int, settings: dict[str, Any]
) -> None:
    store, rows, logits = built(geometry, settings), draw(geometry, prompts, steps), Logits(geometry.scaling)
    prefill(store, rows, logits)
    checked(store, geometry, rows, range(steps), logits)


@pytest.mark.parametrize("kind", ["softcap", "sinks"])
@pytest.mark.parametrize("settings", [SPARSE, {**DEEP, "select": "head"}, {**DEEP, "tail": False}], ids=name)
def test_softcap_and_sinks_of_the_model(settings: dict[str, Any], kind: str) -> None:
    sinks = torch.linspace(-2, 3, SMALL.heads) if kind == "sinks" else None
    logits = Logits(SMALL.scaling, softcap=2.0 if kind == "softcap" else None, sinks=sinks)
    store, rows = built(SMALL, {"keep": 0.2, "rank": 1.0, **settings}), draw(SMALL, RAGGED[:4], 3)
    prefill(store, rows, logits)
    checked(store, SMALL, rows, range(3), logits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("settings", [SPARSE, DEEP, {**DEEP, "select": "head", "basis": "pca"}], ids=name)
def test_other_dtypes(settings: dict[str, Any], dtype: torch.dtype) -> None:
    """All sums are in float32: only what is stored and given is rounded."""
    store, rows = built(G64, {"keep": 0.2, **settings}), draw(G64, (20, 90), 6, dtype=dtype)
    prefill(store, rows, Logits(0.125))
    checked(store, G64, rows, range(6), Logits(0.125))
    assert store.totals["open.value"].dtype == torch.float32


@pytest.mark.parametrize("settings", [SPARSE, {**DEEP, "select": "head"}], ids=name)
def test_after_everything_that_happens_to_a_cache(settings: dict[str, Any]) -> None:
    """Windows that close, tokens taken back, rows chosen, a second prompt, a restart: still the formula."""
    settings = {"keep": 0.3, "rank": 1.0, **settings}
    store, rows = built(SMALL, settings), draw(SMALL, (1, 12, 60), 40)
    prefill(store, rows, PLAIN)
    checked(store, SMALL, rows, range(11))
    store.crop(3)  # across the end of a window
    rows = [fork(row, 8, seed) for seed, row in enumerate(rows)]
    checked(store, SMALL, rows, range(8, 10))
    store.crop(1)  # within one
    rows = [fork(row, 9, seed) for seed, row in enumerate(rows)]
    checked(store, SMALL, rows, range(9, 13))
    rows = [fork(rows[of], 13, seed) for seed, of in enumerate((1, 0, 1))]  # the longest is gone
    store.select(torch.tensor([1, 0, 1]))
    checked(store, SMALL, rows, range(13, 19))
    turns = [
        Row(*(tensor[:, row.prompt + 19 : row.prompt + 19 + count] for tensor in row.tensors()), count)
        for row, count in zip(rows, (6, 2, 1), strict=True)
    ]
    (query, key, value), valid = padded(turns)
    store.prefill(query, key, value, PLAIN, valid)
    rows = [Row(*row.tensors(), row.prompt + 19 + turn.prompt) for row, turn in zip(rows, turns, strict=True)]
    checked(store, SMALL, rows, range(3))
    restored = built(SMALL, settings)
    restored.restore({name: tensor.clone() for name, tensor in store.state().items()})
    checked(restored, SMALL, rows, range(3, 8))


def test_a_row_that_pauses_goes_on_by_the_formula() -> None:
    """Its open window has what it had; so has that of a row that pauses right after its prompt."""
    store, rows = built(SMALL, {"keep": 0.3, "rank": 1.0, **DEEP, "window": 20}), draw(SMALL, (30, 40), 12)
    prefill(store, rows, PLAIN)
    for coming in (0, 0, 1, 0, 1, 1):
        at = [length - row.prompt for length, row in zip(store.lengths, rows, strict=True)]
        new = [
            torch.stack(
                [
                    row.tensors()[of][:, row.prompt + step : row.prompt + step + 1]
                    for row, step in zip(rows, at, strict=True)
                ]
            )
            for of in (1, 2)
        ]
        new[0][1 - coming] = new[1][1 - coming] = torch.nan
        store.append(*new, torch.tensor([[coming == 0], [coming == 1]]))
    rows = [Row(*row.tensors(), row.prompt + 3) for row in rows]
    checked(store, SMALL, rows, range(6))


@pytest.mark.parametrize("keep", [10**6, 110, 1.0], ids=str)
@pytest.mark.parametrize("more", [SPARSE, {**DEEP, "select": "head"}, {**DEEP, "tail": False, "refine": 1}], ids=name)
def test_budgets_above_the_sequence_are_full(keep: float, more: dict[str, Any]) -> None:
    store, rows = built(SMALL, {"keep": keep, "rank": 1.0, **more}), draw(SMALL, (1, 15, 90), 9)
    prefill(store, rows, PLAIN)
    for row, got in zip(rows, decode(store, rows, PLAIN), strict=True):
        assert_steps(got, full(row, PLAIN))


@pytest.mark.parametrize("more", [SPARSE, DEEP], ids=name)
@pytest.mark.parametrize("select", ["head", "group", "max"])
def test_keeps_to_its_budget(select: str, more: dict[str, Any]) -> None:
    """Also where sinks and the open window are longer; sinks and recent tokens take half of it."""
    store, rows = built(SMALL, {"keep": 16, "rank": 1.0, "select": select, **more, "recent": 30}), draw(SMALL, [80], 9)
    prefill(store, rows, PLAIN)
    for number, step in enumerate(decode(store, rows, PLAIN)[0]):
        assert step.read.sum(1).tolist() == [16] * SMALL.heads
        window = number % SPARSE["window"] + 1
        assert step.read[:, :2].all() and step.read[:, -min(6, window) :].all()


@pytest.mark.parametrize("select", ["head", "group", "max"])
def test_more_clusters_than_directions(select: str) -> None:
    """Some stay without tokens, and take no part in a choice."""
    length = 0.5 + torch.rand(2, 63, 1, generator=torch.Generator().manual_seed(1))
    rows = [
        Row(row.query, row.key[:, :6].repeat(1, 11, 1)[:, :63] * length, row.value, row.prompt)
        for row in draw(SMALL, [60] * 12, 3)
    ]
    store = built(SMALL, {"keep": 8, "rank": 1.0, "select": select, **DEEP, "bits": 8})
    prefill(store, rows, PLAIN)
    checked(store, SMALL, rows, range(3))
    assert (store.clusters.sizes == 0).any()


def test_sum_of_the_open_window() -> None:
    """Sinks are in none, nor is what has a cluster."""
    store, rows = built(SMALL, {"keep": 0.3, "rank": 1.0, **SPARSE, "sinks": 5}), draw(SMALL, (1, 3, 40), 14)
    prefill(store, rows, PLAIN)
    for step in range(14):
        append(store, rows, step)
        for index, row in enumerate(rows):
            tokens = row.prompt + step + 1
            closed = (tokens - 1 - max(row.prompt, 5)) // 4 * 4 if tokens > 5 else 0
            value = row.value[:, max(row.prompt, 5) + closed : tokens].sum(1) if tokens > 5 else torch.zeros(2, 8)
            torch.testing.assert_close(store.totals["open.value"][index], value, rtol=1e-5, atol=1e-5)
