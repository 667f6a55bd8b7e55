"""`resident_bytes` and `bytes_read` counted by hand, and against the memory that really is behind the tensors."""

from __future__ import annotations

from math import ceil
from typing import Any

import pytest
import torch
from sequences import VARIANTS, Geometry, decode, draw, make, prefill

from kvcal.runtime.attention import Logits
from kvcal.runtime.stores import Store

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
    pca = step(n - 1, "loki", dtype, rank=0.25, keep=0.25, select=select)
    assert pca.resident_bytes() == HKV * chunks(n) * (D + DV) * b
    # The index is part of the keys; the components turn the query and the new key, read once for both.
    assert pca.bytes_read() == HKV * n * r * b + rows_read + HKV * D * D * b
    score = step(n - 1, "loki", dtype, rank=0.25, keep=0.25, select=select, basis="score")
    assert score.resident_bytes() == HKV * chunks(n) * (D + DV + r) * b
    assert score.bytes_read() == HKV * n * r * b + rows_read + 2 * HKV * r * D * b


def test_loki_read_whole() -> None:
    n, b = 40, 4
    assert step(n - 1, "loki", dense_below=100).bytes_read() == HKV * n * (D + DV) * b + HKV * D * D * b
    assert step(n - 1, "loki", basis="score", keep=1.0).bytes_read() == HKV * n * (D + DV) * b


@pytest.mark.parametrize(("select", "readers"), [("head", HQ), ("group", HKV)])
def test_exact_topk(select: str, readers: int) -> None:
    n, k, b = 300, 30, 4
    store = step(n - 1, "exact_topk", keep=0.1, select=select)
    assert store.resident_bytes() == HKV * chunks(n) * (D + DV) * b
    assert store.bytes_read() == HKV * n * D * b + readers * k * DV * b


@pytest.mark.parametrize("page", [16, 5])
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
    assert store.resident_bytes() == 0
    prefill(store, rows, LOGITS)
    assert store.resident_bytes() == memory(store)
    decode(store, rows, LOGITS, range(3))
    assert store.resident_bytes() == memory(store)
    store.select(torch.tensor([2, 0]))
    decode(store, [rows[2], rows[0]], LOGITS, range(3, 6))
    assert store.resident_bytes() == memory(store)


@pytest.mark.parametrize("name", VARIANTS)
def test_equal_rows_add_up(name: str) -> None:
    method, settings = VARIANTS[name]
    one, three = (step(90, method, batch=batch, **settings) for batch in (1, 3))
    assert three.resident_bytes() == 3 * one.resident_bytes()
    basis = one.basis.maps(one.rows["key"].view) if method == "loki" else ()
    shared = sum(each.nbytes for each in ({id(each): each for each in basis}.values()))  # read once per step
    assert three.bytes_read() - shared == 3 * (one.bytes_read() - shared)


def memory(store: Store) -> int:
    """Bytes of the storages behind the tensors that a store holds on to."""
    tensors = [rows.tensor for rows in store.rows.values() if rows.tensor is not None] + list(store.totals.values())
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
