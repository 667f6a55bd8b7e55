"""Calibrated thresholds: how many scores reach them, and what a store reads with them."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import samples
import torch
from scipy.stats import norm
from sequences import Geometry, Row, alone, assert_steps, decode, draw, make, maps, prefill
from torch import Tensor

from kvcal.artifacts import KvcalError
from kvcal.runtime.attention import Logits
from kvcal.runtime.stores.loki import Loki
from kvcal.runtime.stores.thresholds import POINTS, Thresholds, bounds, quantiles, standardised

PLAIN = Logits(0.25)
HEADS, RANK = 2, 8


def text(tokens: int, seed: int, drift: float = 0.0, dependent: bool = True) -> tuple[Tensor, Tensor]:
    """Queries and keys [Hkv, tokens, r] of one distribution, neither centred nor isotropic; `drift` moves the keys'
    mean with their position."""
    shape = torch.Generator().manual_seed(99)
    spread = torch.randn(HEADS, RANK, RANK, generator=shape) / 2
    mean = torch.randn(HEADS, 1, RANK, generator=shape)
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(HEADS, tokens, RANK, generator=generator) for _ in range(2))
    return query + 0.5, key @ spread + mean * (1 + drift * torch.arange(tokens).view(1, -1, 1) / tokens)


def calibrated(tokens: int = 2048, texts: int = 2, group: int = 1, drift: float = 0.0) -> Thresholds:
    queries, keys = zip(*(text(tokens, seed, drift) for seed in range(texts)), strict=True)
    position = torch.arange(tokens).repeat(texts)
    return Thresholds.fit(torch.cat(queries, 1), torch.cat(keys, 1), position, group)


def counts(thresholds: Thresholds, length: int, wanted: int, group: int, drift: float = 0.0, of: int = 2048) -> Tensor:
    """[Hkv, n] how many of the first `length` keys of another text reach the thresholds of 64 groups of queries."""
    query, key = text(of, 77, drift)
    key, query = key[:, :length], query[:, : 64 * group].unflatten(1, (64, group)).transpose(0, 1)
    rows = [torch.full((64,), number, dtype=torch.int32) for number in (wanted, length)]
    reached = thresholds.of(query, *rows, PLAIN)
    scores = PLAIN.of(query @ key.mT)
    if thresholds.by_group:
        assert reached.shape == (64, HEADS, 1)
        scores = scores.amax(2, keepdim=True)
    return (scores >= reached.unsqueeze(-1)).sum(-1).float().flatten(1).T


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize(("length", "wanted"), [(2048, 1024), (2048, 256), (2048, 60), (1024, 128), (300, 40)])
def test_about_as_many_reach_as_are_wanted(length: int, wanted: int, group: int) -> None:
    reached = counts(calibrated(group=group), length, wanted, group)
    assert abs(float(reached.mean()) / wanted - 1) < 0.2


def test_keys_that_depend_on_their_position() -> None:
    """The threshold is a function of the length, and not of p = k / S alone."""
    thresholds = calibrated(drift=8.0)
    longest = thresholds.tables[-1:].expand_as(thresholds.tables)
    of_longest = dataclasses.replace(thresholds, tables=longest, _moved={})
    for length in (2048, 1450, 1024, 512):  # between two calibrated lengths, too
        reached = counts(thresholds, length, length // 8, 1, drift=8.0) / (length / 8)
        assert abs(float(reached.mean()) - 1) < 0.25 and float((reached - 1).abs().mean()) < 0.5, length
    reached = counts(of_longest, 512, 64, 1, drift=8.0) / 64
    assert float((reached - 1).abs().mean()) > 0.8


def test_moments_give_mean_and_deviation() -> None:
    """Keys of a normal distribution: z is its quantile, whatever their mean and covariance and whatever the query."""
    thresholds = calibrated(texts=4)
    query = 3 * torch.randn(1, HEADS, 2, RANK, generator=torch.Generator().manual_seed(3))
    keys = torch.cat([text(2048, seed)[1] for seed in range(4)], 1).double()
    mean, spread = keys.mean(1), torch.stack([torch.cov(head.T, correction=0) for head in keys])
    for wanted, seen, tolerance in ((512, 2048, 0.05), (60, 2048, 0.15), (1, 10**6, 0.7)):
        rows = [torch.tensor([number], dtype=torch.int32) for number in (wanted, seen)]
        found = thresholds.of(query, *rows, PLAIN)[0]
        for head in range(HEADS):
            for index, of in enumerate(query[0, head].double()):
                deviation = math.sqrt(float(of @ spread[head] @ of))
                z = (float(found[head, index]) / PLAIN.scaling - float(of @ mean[head])) / deviation
                assert abs(z - norm.isf(wanted / seen)) < tolerance


def test_beyond_the_grid_a_normal_tail() -> None:
    thresholds = calibrated()
    query = torch.ones(1, HEADS, 1, RANK)
    one, seen = torch.tensor([1], dtype=torch.int32), 2048
    length = torch.tensor([2**20], dtype=torch.int32)
    end = torch.tensor([round(2**20 * thresholds.smallest)], dtype=torch.int32)
    near, far = (thresholds.of(query, of, length, PLAIN)[0, :, 0] for of in (end, one))
    query_of = query[0, :, 0]
    covariance = thresholds.tables[-1, :, RANK : RANK + RANK**2].unflatten(1, (RANK, RANK))
    deviation = (query_of.unsqueeze(1) @ covariance @ query_of.unsqueeze(2)).flatten().sqrt() * PLAIN.scaling
    rise = norm.isf(2.0**-20) - norm.isf(thresholds.smallest)
    torch.testing.assert_close(far - near, deviation * rise, rtol=1e-3, atol=1e-4)
    assert thresholds.smallest == 2 / (2 * seen)


def test_quantiles() -> None:
    """numpy's "hazen", which puts the k-th of N at (k - 1/2) / N; the mean over rows."""
    values = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(1))
    shares = torch.tensor([0.0, 0.01, 0.1, 0.33, 0.5, 0.99, 1.0])
    expected = np.quantile(values.double().numpy(), 1 - shares.double().numpy(), axis=-1, method="hazen").mean(-1).T
    torch.testing.assert_close(quantiles(values, shares).double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)


def test_a_group_counts_by_its_largest_logit() -> None:
    """x reaches max_g (m_g + s_g z) exactly when z is at most its standardised score."""
    query, key = text(96, 5)
    mean, covariance = torch.randn(HEADS, RANK), torch.eye(RANK).expand(HEADS, RANK, RANK) * 2
    found = standardised(query[:, :12], key, mean, covariance, 3)
    assert found.shape == (HEADS, 4, 96)
    scores = (query[:, :12] @ key.mT).unflatten(1, (4, 3))
    expected = (query[:, :12] @ mean.unsqueeze(-1)).unflatten(1, (4, 3))
    deviation = (2**0.5 * query[:, :12].norm(dim=-1, keepdim=True)).unflatten(1, (4, 3))
    for z in (-1.0, 0.0, 0.7, 2.0):
        assert torch.equal(found >= z, scores.amax(2) >= (expected + z * deviation).amax(2))


def test_a_softcap_bends_the_threshold_as_it_bends_scores() -> None:
    thresholds, rows = calibrated(), [torch.tensor([number], dtype=torch.int32) for number in (100, 1000)]
    query = torch.randn(1, HEADS, 2, RANK, generator=torch.Generator().manual_seed(3))
    plain, capped = (thresholds.of(query, *rows, of) for of in (PLAIN, Logits(0.25, softcap=0.8)))
    torch.testing.assert_close(capped, 0.8 * torch.tanh(plain / 0.8))


def test_rows_of_a_batch_have_thresholds_of_their_own() -> None:
    thresholds = calibrated()
    query = torch.randn(3, HEADS, 2, RANK, generator=torch.Generator().manual_seed(3))
    wanted, seen = (torch.tensor(of, dtype=torch.int32) for of in ([1, 90, 700], [33, 900, 5000]))
    together = thresholds.of(query, wanted, seen, PLAIN)
    for row in range(3):
        one = slice(row, row + 1)
        torch.testing.assert_close(thresholds.of(query[one], wanted[one], seen[one], PLAIN), together[one])


def test_bounds() -> None:
    wanted, seen = (torch.tensor(of, dtype=torch.int32) for of in ([1, 7, 10, 9, 12], [5, 100, 15, 9, 13]))
    least, most = bounds(wanted, seen)
    assert least.tolist() == [1, 6, 8, 9, 9] and most.tolist() == [2, 11, 15, 9, 13]


GEOMETRY = Geometry(16, 8, 2, 2)
SETTINGS = {"rank": 0.5, "keep": 0.25, "basis": "pca", "select": "head", "choice": "threshold"}


def oracle(row: Row, logits: Logits, store: object, settings: dict) -> list[Tensor]:
    """[Hq, n] bool of each step: what reaches the threshold, but at least 3/4 k and at most 3/2 k of the best."""
    query_map, key_map = (each[:, :8] for each in maps(GEOMETRY, settings.get("basis", "pca"), 8))
    steps = []
    for tokens in range(row.prompt + 1, row.key.shape[1] + 1):
        k = max(1, math.ceil(settings["keep"] * tokens - 1e-9)) if tokens >= settings.get("dense_below", 0) else tokens
        coded = (row.query[:, tokens - 1].unflatten(0, (2, 2)) @ query_map.mT).unsqueeze(0)
        one = [torch.tensor([number], dtype=torch.int32) for number in (k, tokens)]
        threshold = store.thresholds.of(coded, *one, logits)[0]
        scores = logits.of(coded[0] @ (row.key[:, :tokens] @ key_map.mT).mT)
        if settings.get("select") == "max":
            scores = scores.amax(1, keepdim=True)
        read = torch.zeros(2, 2, tokens, dtype=torch.bool)
        for head, query in np.ndindex(*scores.shape[:2]):
            reaching = int((scores[head, query] >= threshold[head, query]).sum())
            count = k if k == tokens else min(max(reaching, math.ceil(k * 3 / 4)), math.ceil(k * 3 / 2), tokens)
            best = scores[head, query].sort(descending=True).indices[:count]
            read[head, slice(None) if scores.shape[1] == 1 else query, best] = True
        steps.append(read.flatten(0, 1))
    return steps


@pytest.mark.parametrize(
    "more", [{}, {"select": "max"}, {"basis": "score", "select": "max", "dense_below": 70}], ids=str
)
def test_what_a_store_reads(more: dict) -> None:
    settings, logits = {**SETTINGS, **more}, Logits(GEOMETRY.scaling, softcap=20.0)
    rows = draw(GEOMETRY, (3, 64, 200), 4)
    store = make("loki", GEOMETRY, **settings)
    prefill(store, rows, logits)
    numbers = set()
    for row, got in zip(rows, decode(store, rows, logits), strict=True):
        for step, expected in zip(got, oracle(row, logits, store, settings), strict=True):
            assert torch.equal(step.read, expected)
            numbers |= {(int(count), step.read.shape[1]) for count in step.read.sum(1)}
        assert_steps(alone("loki", GEOMETRY, row, logits, **settings), got)
    assert len({count for count, tokens in numbers if tokens > 200}) > 4, "thresholds decide, not bounds alone"


def test_bytes_are_those_of_the_chosen_tokens() -> None:
    (row,) = draw(GEOMETRY, [300], 1)
    store = make("loki", GEOMETRY, **SETTINGS)
    prefill(store, [row], PLAIN)
    (((step),),) = decode(store, [row], PLAIN)
    tables = 2 * 2 * (8 + 64 + POINTS + 1) * 4  # of two lengths, for two heads
    rows_read = int(step.read.sum()) * (16 + 8) * 4
    assert len(store.thresholds.tables) > 1
    assert store.bytes_read() == 2 * 301 * 8 * 4 + 2 * 16 * 16 * 4 + tables + rows_read


ARTIFACT = samples.artifact(head_dim=12, value_dim=5, tokens=40)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"choice": "some"}, "choice 'some': give exact or threshold"),
        ({"choice": "threshold", "select": "group"}, "choice 'threshold' with select 'group': a mean of softmaxes"),
    ],
    ids=str,
)
def test_refused(settings: dict, message: str) -> None:
    with pytest.raises(KvcalError, match=f"^{message}[^\n]*$"):
        Loki(**settings).build(0, 12, ARTIFACT)


def test_what_the_artifact_has_to_have() -> None:
    stages = {name: stage for name, stage in ARTIFACT.stages.items() if name != "reservoir"}
    with pytest.raises(KvcalError, match=r"^[^\n]*no stage 'reservoir'[^\n]*$"):
        Loki(choice="threshold", basis="pca", select="head").build(0, 12, dataclasses.replace(ARTIFACT, stages=stages))
    with pytest.raises(KvcalError, match=r"^a reservoir of 1 tokens: thresholds need more[^\n]*$"):
        Loki(choice="threshold", basis="pca", select="head").build(0, 12, samples.artifact(head_dim=12, tokens=1))
    store = Loki(choice="threshold", basis="pca", select="max").build(1, 12, ARTIFACT)()
    assert store.thresholds.by_group and store.thresholds.longest == 40
