"""When clusters are made and unmade: what was taken back never was, and no row feels the rows beside it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import samples
import torch
from methods import FORMS
from oracle_clusters import clustering_of, decode_checked, whole_clusters
from sequences import Geometry, Row, alone, append, assert_steps, decode, draw, fork, make, prefill
from torch import Tensor

from kvcal.artifacts import Stage
from kvcal.runtime.attention import SoftmaxSpec
from kvcal.runtime.methods.clusterkv import ClusterKV
from kvcal.runtime.methods.kmeans import spherical_kmeans
from kvcal.runtime.settings import new_store
from kvcal.runtime.store import Store

GEOMETRY, SPEC = Geometry(16, 8, 2, 3), SoftmaxSpec(0.25)
CLUSTERED = ["clusterkv", "clusterkv-tail", "clusterkv-offload"]
STEPS = 12
"""The window of every variant is 3."""


@pytest.fixture(params=CLUSTERED)
def variant(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    method, settings = FORMS[request.param]
    return method, {**settings, "window": 3, "sinks": 2}


def filled(variant: tuple[str, dict[str, Any]], rows: list[Row], steps: int) -> Store:
    method, settings = variant
    store = make(method, GEOMETRY, **settings)
    prefill(store, rows, SPEC)
    decode(store, rows, SPEC, range(steps))
    return store


def together(rows: list[Row], begin: int, end: int) -> list[Tensor]:
    """[query, key, value] [B, H, T, D] of the tokens `begin` to `end` counted from the end of each prompt."""
    return [
        torch.stack([row.tensors()[which][:, row.prompt + begin : row.prompt + end] for row in rows])
        for which in range(3)
    ]


def assert_goes_on(store: Store, variant: tuple[str, dict[str, Any]], rows: list[Row], start: int) -> None:
    """As stores do that had these rows alone from the beginning."""
    method, settings = variant
    for row, got in zip(rows, decode(store, rows, SPEC, range(start, STEPS)), strict=True):
        assert_steps(got, alone(method, GEOMETRY, row, SPEC, **settings)[start:])


@pytest.mark.parametrize("copied", [False, True], ids=["itself", "restored"])
@pytest.mark.parametrize("crop", [1, 3, 4, 6, 7, 10])
def test_crop_within_and_across_windows(variant: tuple[str, dict[str, Any]], crop: int, copied: bool) -> None:
    """A cache that was saved knows where its windows ended, too."""
    rows = draw(GEOMETRY, (1, 33, 9, 40), STEPS)
    store = filled(variant, rows, 10)
    if copied:
        state, store = store.state(), make(variant[0], GEOMETRY, **variant[1])
        store.restore({name: tensor.clone() for name, tensor in state.items()})
    store.crop(crop)
    assert_goes_on(store, variant, [fork(row, 10 - crop, seed) for seed, row in enumerate(rows)], 10 - crop)


@pytest.mark.parametrize("crop", [1, 5, 9])
def test_crop_into_the_prompt_and_a_second_prompt(variant: tuple[str, dict[str, Any]], crop: int) -> None:
    """Tokens that come then are of one prompt with those that stayed, whose clusters are made anew."""
    rows = draw(GEOMETRY, (10, 33), STEPS)
    store = filled(variant, rows, 4)
    store.crop(4 + crop)
    more = together(rows, -crop, 0)
    store.prefill(*more, SPEC)
    assert_goes_on(store, variant, rows, 0)


def test_crop_to_the_end_of_the_prompt_and_a_longer_one(variant: tuple[str, dict[str, Any]]) -> None:
    """Its clusters were made for a token that never came: now they are made of the whole prompt."""
    rows = draw(GEOMETRY, (10, 33), STEPS)
    shorter = [Row(*row.tensors(), prompt=row.prompt - 6) for row in rows]
    store = filled(variant, shorter, 1)
    store.crop(1)
    more = together(rows, -6, 0)
    store.prefill(*more, SPEC)
    assert_goes_on(store, variant, rows, 0)


@pytest.mark.parametrize("crop", [1, 2, 5, 7, 8, 9])
def test_crop_into_and_before_a_second_turn(variant: tuple[str, dict[str, Any]], crop: int) -> None:
    """Prompt, 4 decoded tokens, 6 at once, 2 decoded: some are taken back, then others are decoded."""
    rows = draw(GEOMETRY, (10, 33), 24)
    cropped, never = (filled(variant, rows, 4) for _ in range(2))
    turn = together(rows, 4, 10)
    cropped.prefill(*turn, SPEC)
    decode(cropped, rows, SPEC, range(10, 12))
    cropped.crop(crop)
    stay = 12 - crop
    if stay >= 4:
        never.prefill(*(tensor[:, :, : min(6, stay - 4)] for tensor in turn), SPEC) if stay > 4 else None
        decode(never, rows, SPEC, range(10, stay))
    else:
        never = filled(variant, rows, stay)
    forks = [fork(row, stay, seed) for seed, row in enumerate(rows)]
    for one, other in zip(*(decode(each, forks, SPEC, range(stay, 22)) for each in (cropped, never)), strict=True):
        assert_steps(one, other)


def test_guesses_may_close_windows(variant: tuple[str, dict[str, Any]]) -> None:
    """Rounds of four guesses, of which some stay, as speculative decoding makes them."""
    rows = draw(GEOMETRY, (10, 33), STEPS)
    store = filled(variant, rows, 0)
    step = 0
    for number, accepted in enumerate((0, 3, 1, 4, 2)):
        guesses = [fork(row, step + accepted, seed=number) for row in rows]
        got = decode(store, guesses, SPEC, range(step, min(STEPS, step + 4)), revocable=True)
        taken = len(got[0])
        if taken > accepted:
            store.crop(taken - accepted)
        store.settle()
        step += min(accepted, taken)
    assert step == 10
    assert_goes_on(store, variant, rows, step)


def test_a_row_that_pauses_closes_its_windows_later(variant: tuple[str, dict[str, Any]]) -> None:
    method, settings = variant[0], {**variant[1], "keep": 0.8}  # so much that no window closes early
    rows = draw(GEOMETRY, (30, 17), STEPS)
    ahead, behind = (alone(method, GEOMETRY, row, SPEC, **settings) for row in rows)
    store = make(method, GEOMETRY, **settings)
    prefill(store, rows, SPEC)
    done = [0, 0]
    for pauses in ("", "1", "", "1", "0", "", "1", "0", "01", "", "1", "", "1", ""):
        new = [
            torch.stack(
                [
                    row.tensors()[which][:, row.prompt + at : row.prompt + at + 1]
                    for row, at in zip(rows, done, strict=True)
                ]
            )
            for which in range(3)
        ]
        here = torch.tensor([["0" not in pauses], ["1" not in pauses]])
        store.append(new[1], new[2], here)
        output = store.attend(new[0], SPEC)[:, :, 0].double()
        for row, steps in enumerate((ahead, behind)):
            if here[row]:
                torch.testing.assert_close(
                    output[row], steps[done[row]].output, rtol=1e-4, atol=1e-5, check_dtype=False
                )
                done[row] += 1
    assert done == [11, 8] and store.sequence_index.upto == [39, 23]  # type: ignore[attr-defined]


def test_nothing_is_left_behind(variant: tuple[str, dict[str, Any]]) -> None:
    """A cache cropped to the middle of its prompt holds what one does that had no more tokens."""
    method, settings = variant
    (row,) = draw(GEOMETRY, [40], 8)
    store = filled(variant, [row], 8)
    store.crop(8 + 17)
    never = make(method, GEOMETRY, **settings)
    prefill(never, [Row(*row.tensors(), prompt=23)], SPEC)
    assert store.state().keys() == never.state().keys()
    append(store, [Row(*row.tensors(), prompt=23)], 0), append(never, [Row(*row.tensors(), prompt=23)], 0)
    for name, tensor in never.state().items():
        torch.testing.assert_close(store.state()[name], tensor, msg=name)


def test_a_row_that_pauses_before_a_turn(variant: tuple[str, dict[str, Any]]) -> None:
    """Its open window is clustered together with the turn, although another row's was closed meanwhile."""
    rows = draw(GEOMETRY, (10, 33), STEPS)
    store, alone_ = filled(variant, rows, 3), filled(variant, rows[1:], 3)
    nothing = torch.full((2, GEOMETRY.kv_heads, 1, GEOMETRY.dim), torch.nan)
    nothing[0] = 0
    store.append(nothing, nothing[..., : GEOMETRY.value_dim], torch.tensor([[True], [False]]))
    turn = together(rows, 3, 7)
    store.prefill(*turn, SPEC)
    alone_.prefill(*(tensor[1:] for tensor in turn), SPEC)
    first = Row(*rows[0].tensors(), prompt=11)  # it is a token ahead
    expected = decode(alone_, rows[1:], SPEC, range(7, 11))[0]
    assert_steps(decode(store, [first, rows[1]], SPEC, range(7, 11))[1], expected)


def test_what_is_stored_of_clusters() -> None:
    """k-means of each row's keys alone, in the order of its clusters; means and sizes of each, in order of arrival."""
    method, settings = FORMS["clusterkv"]
    rows = draw(GEOMETRY, (40, 90, 9), 1)
    store = make(method, GEOMETRY, **settings)
    prefill(store, rows, SPEC)
    decode(store, rows, SPEC)
    for index, row in enumerate(rows):
        tokens = row.prompt - 2
        labels = spherical_kmeans(row.key[None, :, 2 : row.prompt], [tokens], [round(tokens / 4)]).labels[0]
        for head in range(GEOMETRY.kv_heads):
            for cluster, members in enumerate(clustering_of(store, index, head).members):
                assert members.tolist() == ((labels[head] == cluster).nonzero().flatten() + 2).tolist()
                stands = {
                    of: store.sequence_index.buffers[f"cluster.{of}"].view[index, head, cluster]
                    for of in ("key", "value", "size")
                }
                torch.testing.assert_close(stands["key"], row.key[head, members].mean(0), rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(stands["value"], row.value[head, members].mean(0), rtol=1e-4, atol=1e-5)
                assert stands["size"].item() == len(members)


@pytest.mark.parametrize("tail", [False, True])
def test_calibrated_centroids_are_what_it_begins_with(tail: bool) -> None:
    """Those of a layer's stage `clusters`: of like keys, fewer passes, and the same formula."""
    middle = 2 * torch.randn(2, 30, 16, generator=torch.Generator().manual_seed(1))
    rows = [
        Row(row.query, middle.repeat(1, 21, 1)[:, : row.prompt + 2] + 0.6 * row.key, row.value, row.prompt)
        for row in draw(GEOMETRY, [616, 616], 2)
    ]
    plain = samples.artifact(head_dim=16, value_dim=8)
    tensors = {"layers.0.centroids": torch.randn(2, 30, 16), "layers.1.centroids": 3 * middle}
    artifact = dataclasses.replace(plain, stages={**plain.stages, "clusters": Stage(tensors)})
    settings = {"keep": 60, "tokens_per_cluster": 20, "tail": tail}
    passes = {}
    for name, of in (("known", artifact), ("none", plain), ("no artifact", None)):
        store = new_store(ClusterKV(**settings).bind(1, 16, of))
        prefill(store, rows, SPEC)
        decode_checked(store, rows, SPEC, whole_clusters, settings, range(2))
        passes[name] = store.sequence_index.most_passes
    assert passes["known"] < passes["none"] == passes["no artifact"]


def test_the_row_of_most_clusters_goes(variant: tuple[str, dict[str, Any]]) -> None:
    """Not the longest one, which paused while the other closed window after window."""
    method, settings = variant
    settings = {**settings, "window": 1, "tokens_per_cluster": 6}
    short, long = draw(GEOMETRY, (12, 40), STEPS)
    store = make(method, GEOMETRY, **settings)
    prefill(store, [short, long], SPEC)
    for step in range(9):
        key, value = (
            torch.stack([of[:, at : at + 1] for of, at in zip(pair, (12 + step, 40), strict=True)])
            for pair in ((short.key, long.key), (short.value, long.value))
        )
        store.append(key, value, torch.tensor([[True], [step == 0]]))
    store.reorder(torch.tensor([1]))
    expected = alone(method, GEOMETRY, long, SPEC, **settings)[1:]
    assert_steps(decode(store, [long], SPEC, range(1, STEPS))[0], expected)


@pytest.mark.parametrize(("window", "per_cluster"), [(20, 5), (1000, 5), (1000, 80)])
def test_no_step_reads_more_than_asked_for(window: int, per_cluster: int) -> None:
    """However large the window, and a cluster: budgets above the sinks are never exceeded."""
    rows = draw(GEOMETRY, (40, 90), 60)
    settings = {"keep": 16, "tokens_per_cluster": per_cluster, "sinks": 3, "window": window, "tail": True}
    store = make("clusterkv", GEOMETRY, **settings)
    prefill(store, rows, SPEC)
    for steps in decode(store, rows, SPEC):
        assert all((step.read.sum(-1) == 16).all() for step in steps)
