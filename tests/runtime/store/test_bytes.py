"""`resident_bytes` and `bytes_read` counted by hand, and against the memory that really is behind the tensors."""

from __future__ import annotations

from math import ceil
from typing import Any

import pytest
import torch
from sequences import VARIANTS, Geometry, decode, draw, make, prefill

from kvcal.runtime.attention import Logits
from kvcal.runtime.store import Store

GEOMETRY = Geometry(16, 8, 2, 3)
LOGITS = Logits(GEOMETRY.scaling)
D, DV, HKV, HQ = GEOMETRY.dim, GEOMETRY.value_dim, GEOMETRY.kv_heads, GEOMETRY.heads
CHUNK = 256
SLOTS = 16  # of stores that evict
SIZES = {torch.float32: 4, torch.float64: 8, torch.bfloat16: 2}


def step(prompt: int, method: str, dtype: torch.dtype = torch.float32, batch: int = 1, **settings: Any) -> Store:
    """After a prompt and one decoded token."""
    rows = draw(GEOMETRY, [prompt] * batch, 1, dtype=dtype)
    store = make(method, GEOMETRY, **settings)
    prefill(store, rows, LOGITS)
    decode(store, rows, LOGITS)
    return store


def chunks(tokens: int) -> int:
    return ceil(tokens / CHUNK) * CHUNK


@pytest.mark.parametrize("dtype", SIZES, ids=str)
@pytest.mark.parametrize("prompt", [1, 255, 256, 700])
def test_full(prompt: int, dtype: torch.dtype) -> None:
    store, b, n = step(prompt, "full", dtype, batch=2), SIZES[dtype], prompt + 1
    assert store.resident_bytes() == 2 * HKV * chunks(n) * (D + DV) * b
    assert store.bytes_read() == 2 * HKV * n * (D + DV) * b


@pytest.mark.parametrize("dtype", SIZES, ids=str)
@pytest.mark.parametrize(("select", "readers"), [("head", HQ), ("group", HKV)])
def test_loki(select: str, readers: int, dtype: torch.dtype) -> None:
    n, r, k, b = 300, 4, 75, SIZES[dtype]
    rows_read = readers * k * (D + DV) * b
    pca = step(n - 1, "loki", dtype, rank=0.25, keep=0.25, select=select, basis="pca")
    assert pca.resident_bytes() == HKV * chunks(n) * (D + DV) * b
    # The index is part of the keys; the components turn the query and the new key, read once for both.
    assert pca.bytes_read() == HKV * n * r * b + rows_read + HKV * D * D * b
    score = step(n - 1, "loki", dtype, rank=0.25, keep=0.25, select=select, basis="score")
    assert score.resident_bytes() == HKV * chunks(n) * (D + DV + r) * b
    assert score.bytes_read() == HKV * n * r * b + rows_read + 2 * HKV * r * D * b


def test_loki_read_whole() -> None:
    n, b = 40, 4
    assert step(n - 1, "loki", basis="pca", dense_below=100).bytes_read() == HKV * n * (D + DV) * b + HKV * D * D * b
    assert step(n - 1, "loki", basis="score", keep=1.0).bytes_read() == HKV * n * (D + DV) * b


@pytest.mark.parametrize(("select", "readers"), [("head", HQ), ("group", HKV)])
def test_exact_topk(select: str, readers: int) -> None:
    n, k, b = 300, 30, 4
    store = step(n - 1, "exact_topk", keep=0.1, select=select)
    assert store.resident_bytes() == HKV * chunks(n) * (D + DV) * b
    assert store.bytes_read() == HKV * n * D * b + readers * k * DV * b


@pytest.mark.parametrize("page", [16, 4])
@pytest.mark.parametrize(("select", "readers"), [("head", HQ), ("group", HKV)])
def test_quest(select: str, readers: int, page: int) -> None:
    n, k, b = 300, 75, 4
    store = step(n - 1, "quest", keep=0.25, select=select, page=page)
    pages, growth = ceil(n / page), ceil(CHUNK / page)
    assert store.resident_bytes() == HKV * (chunks(n) * (D + DV) + 2 * ceil(pages / growth) * growth * D) * b
    # Pages are read whole, the growing one too.
    assert store.bytes_read() == 2 * HKV * pages * D * b + readers * ceil(k / page) * page * (D + DV) * b


@pytest.mark.parametrize(("select", "readers"), [("head", HQ), ("group", HKV)])
def test_sparq(select: str, readers: int) -> None:
    n, k, r, b = 300, 75, 4, 4
    store = step(n - 1, "sparq", rank=0.25, keep=0.25, select=select)
    # The sum of values is float32.
    assert store.resident_bytes() == HKV * chunks(n) * (D + DV) * b + HKV * DV * 4
    assert store.bytes_read() == readers * (n * r + k * (D + DV)) * b + HKV * DV * 4


def clusters_held(tokens: int, per_cluster: int, b: int) -> int:
    """Bytes of the buffers of a prompt's clusters per KV head: mean key, mean value, int32 size."""
    growth = ceil(CHUNK / per_cluster)
    return ceil(round(tokens / per_cluster) / growth) * growth * ((D + DV) * b + 4)


@pytest.mark.parametrize("dtype", SIZES, ids=str)
@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize(("select", "readers"), [("head", HQ), ("group", HKV)])
@pytest.mark.parametrize(("prompt", "per_cluster"), [(299, 80), (299, 7), (1100, 3)])
def test_clusterkv(prompt: int, per_cluster: int, select: str, readers: int, tail: bool, dtype: torch.dtype) -> None:
    n, k, sinks, b = prompt + 1, 75, 16, SIZES[dtype]
    store = step(prompt, "clusterkv", dtype, keep=k, select=select, tail=tail, tokens_per_cluster=per_cluster)
    # Every clustered token is listed, in int32.
    tokens = chunks(n) * (D + DV) * b + chunks(prompt) * 4
    assert store.resident_bytes() == HKV * (tokens + clusters_held(prompt - sinks, per_cluster, b))
    # All centroids and sizes, then k tokens and where they lie; for the tail the mean values, too.
    clusters = round((prompt - sinks) / per_cluster)
    read = HKV * clusters * (D * b + 4) + readers * k * ((D + DV) * b + 4)
    if tail:
        read += HKV * clusters * DV * b
    assert store.bytes_read() == read


def test_clusterkv_before_anything_is_clustered() -> None:
    n = 12
    store = step(n - 1, "clusterkv", keep=4)
    assert store.resident_bytes() == HKV * chunks(n) * (D + DV) * 4
    assert store.bytes_read() == HKV * n * (D + DV) * 4


@pytest.mark.parametrize("dtype", SIZES, ids=str)
@pytest.mark.parametrize(("method", "beside"), [("streaming", 4), ("h2o", 4 + 4)])
def test_evicting(method: str, beside: int, dtype: torch.dtype) -> None:
    """Per token an int32 position, and for h2o float32 attention received."""
    n, b = 700, SIZES[dtype]
    k = ceil(0.1 * n)
    rows = draw(GEOMETRY, [n - 1], 1, dtype=dtype)
    store = make(method, GEOMETRY, keep=0.1)
    prefill(store, rows, LOGITS)
    assert store.resident_bytes() == HKV * ceil((n - 1) / SLOTS) * SLOTS * ((D + DV) * b + beside)
    decode(store, rows, LOGITS)
    assert store.resident_bytes() == HKV * ceil(k / SLOTS) * SLOTS * ((D + DV) * b + beside) == memory(store)
    assert store.bytes_read() == HKV * k * ((D + DV) * b + beside)
    assert int(store.read_mask().sum()) == HKV * k


@pytest.mark.parametrize("name", VARIANTS)
def test_counted_is_allocated(name: str) -> None:
    """No view keeps a larger buffer alive: after growth, selection of rows, and evictions."""
    method, settings = VARIANTS[name]
    rows = draw(GEOMETRY, [9, 300, 40], 6)
    store = make(method, GEOMETRY, **settings)
    assert held(store) == 0
    prefill(store, rows, LOGITS)
    assert held(store) == memory(store)
    decode(store, rows, LOGITS, range(3))
    assert held(store) == memory(store)
    store.reorder(torch.tensor([2, 0]))
    decode(store, [rows[2], rows[0]], LOGITS, range(3, 6))
    assert held(store) == memory(store)


@pytest.mark.parametrize("name", [name for name in VARIANTS if "sample" not in VARIANTS[name][1]])
def test_equal_rows_add_up(name: str) -> None:
    """Where the number of tokens read does not depend on what stands in a row."""
    method, settings = VARIANTS[name]
    one, three = (step(90, method, batch=batch, **settings) for batch in (1, 3))
    assert three.resident_bytes() == 3 * one.resident_bytes()
    shared = 0  # read once per step
    if method == "loki":
        maps = one.policy.basis.maps(one.rows["key"].view)
        shared = sum(each.nbytes for each in {id(each): each for each in maps}.values())
    elif method == "spectral":
        shared = one.shared_bytes()
    assert three.bytes_read() - shared == 3 * (one.bytes_read() - shared)


def held(store: Store) -> int:
    """What it says of itself, on the device and on the host."""
    return store.resident_bytes() + store.host_bytes()


def memory(store: Store) -> int:
    """Bytes of the storages behind the tensors that a store holds on to."""
    built = [] if store.index is None else list(store.index.tensors().values())
    tensors = [*store.buffers.tensors(), *store.buffers.sums.values(), *built]
    cache = store.buffers.device_cache
    tensors += [] if cache is None else every_tensor(vars(cache))
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def every_tensor(names: dict[str, Any]) -> list[torch.Tensor]:
    """Those in a dict, and in dicts that it holds, that hold anything."""
    found = [each for each in names.values() if isinstance(each, torch.Tensor)]
    return found + [tensor for each in names.values() if isinstance(each, dict) for tensor in every_tensor(each)]
