"""`resident_bytes` and `bytes_read` counted by hand, and against the memory that really is behind the tensors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hand_counts import Shape
from methods import CASES, FORMS
from sequences import Geometry, decode, draw, make, prefill

from kvcal.runtime.attention import SoftmaxSpec
from kvcal.runtime.cla.group_store import GroupStore
from kvcal.runtime.store import Store

GEOMETRY = Geometry(16, 8, 2, 3)
SPEC = SoftmaxSpec(GEOMETRY.scaling)
D, DV, HKV, HQ = GEOMETRY.dim, GEOMETRY.value_dim, GEOMETRY.kv_heads, GEOMETRY.heads
SIZES = {torch.float32: 4, torch.float64: 8, torch.bfloat16: 2}
COUNTED = [(method, prompt, settings) for method, case in CASES.items() for prompt, settings in case.counted]


def step(prompt: int, method: str, dtype: torch.dtype = torch.float32, batch: int = 1, **settings: Any) -> Store:
    """After a prompt and one decoded token."""
    rows = draw(GEOMETRY, [prompt] * batch, 1, dtype=dtype)
    store = make(method, GEOMETRY, **settings)
    prefill(store, rows, SPEC)
    decode(store, rows, SPEC)
    return store


@pytest.mark.parametrize("dtype", SIZES, ids=str)
@pytest.mark.parametrize(("method", "prompt", "settings"), COUNTED, ids=str)
def test_by_hand(method: str, prompt: int, settings: dict[str, Any], dtype: torch.dtype) -> None:
    store = step(prompt, method, dtype, batch=2, **settings)
    found = CASES[method].bytes(Shape(prompt + 1, prompt, D, DV, HKV, GEOMETRY.group, SIZES[dtype]), **settings)
    assert found is not None
    assert store.resident_bytes() == 2 * found.held == memory(store)
    assert store.bytes_read() == 2 * found.read + found.shared


def test_loki_read_whole() -> None:
    n, b = 40, 4
    assert step(n - 1, "loki", basis="pca", dense_below=100).bytes_read() == HKV * n * (D + DV) * b + HKV * D * D * b
    assert step(n - 1, "loki", basis="score", keep=1.0).bytes_read() == HKV * n * (D + DV) * b


@pytest.mark.parametrize(("method", "beside"), [("streaming", 4), ("h2o", 8)])
def test_a_prompt_is_held_whole(method: str, beside: int) -> None:
    """Until the first decoded token; then so many tokens are read as the budget says."""
    (row,) = draw(GEOMETRY, [699], 1)
    store = make(method, GEOMETRY, keep=0.1)
    prefill(store, [row], SPEC)
    assert store.resident_bytes() == HKV * math.ceil(699 / 16) * 16 * ((D + DV) * 4 + beside)
    decode(store, [row], SPEC)
    assert int(store.read_mask().sum()) == HKV * 70


@pytest.mark.parametrize("name", FORMS)
def test_counted_is_allocated(name: str) -> None:
    """No view keeps a larger buffer alive: after growth, selection of rows, and evictions."""
    method, settings = FORMS[name]
    rows = draw(GEOMETRY, [9, 300, 40], 6)
    store = make(method, GEOMETRY, **settings)
    assert held(store) == 0
    prefill(store, rows, SPEC)
    assert held(store) == memory(store)
    decode(store, rows, SPEC, range(3))
    assert held(store) == memory(store)
    store.reorder(torch.tensor([2, 0]))
    decode(store, [rows[2], rows[0]], SPEC, range(3, 6))
    assert held(store) == memory(store)


@pytest.mark.parametrize("name", [name for name in FORMS if "sample" not in FORMS[name][1]])
def test_equal_rows_add_up(name: str) -> None:
    """Where the number of tokens read does not depend on what stands in a row."""
    method, settings = FORMS[name]
    one, three = (step(90, method, batch=batch, **settings) for batch in (1, 3))
    assert three.resident_bytes() == 3 * one.resident_bytes()
    shared = 0  # read once per step
    if method == "loki":
        maps = one.policy.basis.maps(one.tokens["key"].view)
        shared = sum(each.nbytes for each in {id(each): each for each in maps}.values())
    elif method in ("spectral", "xcla"):
        shared = one.shared_bytes()
    assert three.bytes_read() - shared == 3 * (one.bytes_read() - shared)


def held(store: Store) -> int:
    """What it says of itself, on the device and on the host."""
    return store.resident_bytes() + store.host_bytes()


def memory(store: Store) -> int:
    """Bytes of the storages behind the tensors that a store holds on to."""
    built = [] if store.sequence_index is None else list(store.sequence_index.tensors().values())
    queries = [] if store.observed is None else list(store.observed.state().values())
    recent = store.recent.state().values() if isinstance(store, GroupStore) else ()
    tensors = [*store.buffers.tensors(), *store.buffers.sums.values(), *built, *queries, *recent]
    cache = store.buffers.device_cache
    tensors += [] if cache is None else every_tensor(vars(cache))
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def every_tensor(names: dict[str, Any]) -> list[torch.Tensor]:
    """Those in a dict, and in dicts that it holds, that hold anything."""
    found = [each for each in names.values() if isinstance(each, torch.Tensor)]
    return found + [tensor for each in names.values() if isinstance(each, dict) for tensor in every_tensor(each)]
