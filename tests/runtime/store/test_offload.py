"""Keys and values on the host: the same outputs bit for bit, and the copies of a least-recently-used cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sequences import Geometry, Row, append, assert_steps, decode, draw, fork, make, prefill

from kvcal.kernels import backend
from kvcal.runtime.attention import SoftmaxSpec
from kvcal.runtime.kv.offload import DeviceCache
from kvcal.runtime.kv.pages import HostPages
from kvcal.runtime.store import Store

GEOMETRY, SPEC = Geometry(16, 8, 2, 3), SoftmaxSpec(0.25)
D, DV, HKV = GEOMETRY.dim, GEOMETRY.value_dim, GEOMETRY.kv_heads
SETTINGS: dict[str, dict[str, Any]] = {
    "clusterkv": {"keep": 20, "tokens_per_cluster": 4, "sinks": 3, "window": 5},
    "spectral": {"keep": 20, "sinks": 3, "rank": 1.0, "recent": 2},
}


@pytest.fixture(autouse=True)
def _in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As offloaded steps are: only the same operations give the same bits."""
    monkeypatch.setattr(backend, "has_numba", lambda: False)


SPECTRAL = {"method": "spectral"}
EIGHT = {"method": "spectral", "rows": 8, "select": "head"}


def on_host(tensor: torch.Tensor) -> HostPages:
    rows = HostPages()
    rows.replace(tensor)
    return rows


def pair(prompts: list[Row], cached: int, method: str = "clusterkv", **more: Any) -> tuple[Store, Store]:
    """(with offload, without), the prompts taken in."""
    offload = {"offload": "cpu", "cached": cached}
    stores = [make(method, GEOMETRY, **{**SETTINGS[method], **more, **which}) for which in (offload, {})]
    for store in stores:
        prefill(store, prompts, SPEC)
    return stores[0], stores[1]


def hits(store: Store) -> tuple[int, int]:
    """Tokens that steps found on the device, and those that they did not."""
    assert store.buffers.device_cache
    return store.buffers.device_cache.hits, store.buffers.device_cache.misses


def assert_same(one: Store, other: Store, rows: list[Row], steps: range) -> None:
    for mine, theirs in zip(decode(one, rows, SPEC, steps), decode(other, rows, SPEC, steps), strict=True):
        for first, second in zip(mine, theirs, strict=True):
            assert torch.equal(first.output, second.output) and torch.equal(first.read, second.read)
    assert one.bytes_read() == other.bytes_read()


@pytest.mark.parametrize("cached", [1, 8, 24, 64, 1000])
@pytest.mark.parametrize(
    "more", [{}, {"select": "head", "tail": True}, {"keep": 0.4, "dense_below": 30}, SPECTRAL, EIGHT], ids=str
)
def test_equals_no_offload(cached: int, more: dict[str, Any]) -> None:
    """Ragged rows, windows that close, a step that reads more than is cached, steps that read all."""
    rows = draw(GEOMETRY, (1, 15, 63, 100), 14)
    store, plain = pair(rows, cached, **more)
    assert_same(store, plain, rows, range(14))


@pytest.mark.parametrize("cached", [1, 12, 200])
@pytest.mark.parametrize("more", [{}, SPECTRAL, EIGHT], ids=str)
def test_after_rows_went_or_were_taken_back(cached: int, more: dict[str, Any]) -> None:
    """What the device holds may lie elsewhere by then, or be of another row."""
    rows = draw(GEOMETRY, (15, 63, 100), 24)
    store, plain = pair(rows, cached, **more)
    assert_same(store, plain, rows, range(7))
    forks = [fork(row, 4, seed) for seed, row in enumerate(rows)]
    for each in (store, plain):
        each.crop(3)  # across a window
    assert_same(store, plain, forks, range(4, 9))
    kept = [fork(forks[of], 9, seed) for seed, of in enumerate((1, 1, 0))]
    for each in (store, plain):
        each.reorder(torch.tensor([1, 1, 0]))
    assert_same(store, plain, kept, range(9, 15))
    turn = [torch.stack([row.tensors()[which][:, :6] for row in kept]) for which in range(3)]
    assert torch.equal(*(each.prefill(*turn, SPEC) for each in (store, plain)))
    method = more.get("method", "clusterkv")
    own = {name: value for name, value in more.items() if name != "method"}
    restored = make(method, GEOMETRY, **{**SETTINGS[method], **own, "offload": "cpu", "cached": cached})
    restored.restore({name: tensor.clone() for name, tensor in store.state().items()})
    for step in range(15, 24):
        outputs = [each.attend(append(each, kept, step), SPEC) for each in (store, plain, restored)]
        assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


class LeastRecentlyUsed:
    """Of one row and KV head: slots that hold (token, step of its last use)."""

    def __init__(self, capacity: int):
        self.slots: list[tuple[int, int]] = [(-1, -1)] * capacity
        self.hits = self.misses = 0

    def read(self, tokens: set[int], step: int) -> None:
        held = {token: slot for slot, (token, _) in enumerate(self.slots)}
        here = sorted(tokens & held.keys())
        for token in here:
            self.slots[held[token]] = (token, step)
        for token in sorted(tokens - set(here)):
            oldest = min(range(len(self.slots)), key=lambda slot: (self.slots[slot][1], slot))
            self.slots[oldest] = (token, step)
        self.hits += len(here)
        self.misses += len(tokens) - len(here)


@pytest.mark.parametrize("capacity", [6, 9, 20, 64])
@pytest.mark.parametrize("ragged", [False, True])
def test_hits_and_misses_are_those_of_a_least_recently_used_cache(capacity: int, ragged: bool) -> None:
    """Reads of at most six tokens that come back to some; heads that read the same are asked once."""
    generator = torch.Generator().manual_seed(capacity)
    batch, heads, group, tokens = 2, 3, 2, 40
    host = {
        name: on_host(torch.randn(batch, heads, tokens, dim, generator=generator)) for name, dim in (("a", 4), ("b", 3))
    }
    cache = DeviceCache(capacity)
    oracle = [[LeastRecentlyUsed(capacity) for _ in range(heads)] for _ in range(batch)]
    for step in range(30):
        near = torch.randint(0, tokens, (), generator=generator)
        index = (near + torch.randint(0, 15, (batch, heads, group, 3), generator=generator)) % tokens
        counted = torch.rand(index.shape, generator=generator) < 0.7 if ragged else None
        found = cache.gather(host, index, counted)
        counts = torch.ones_like(index).bool() if counted is None else counted
        for row in range(batch):
            for head in range(heads):
                oracle[row][head].read(set(index[row, head][counts[row, head]].tolist()), step)
                for name, rows in host.items():
                    expected = rows.view[row, head][index[row, head]]
                    assert torch.equal(found[name][row, head][counts[row, head]], expected[counts[row, head]])
    every = [each for of_row in oracle for each in of_row]
    assert (cache.hits, cache.misses) == (sum(e.hits for e in every), sum(e.misses for e in every))
    assert cache.hits > 0 or capacity == 6


def test_a_step_that_reads_more_than_is_cached_makes_room() -> None:
    host = {"key": on_host(torch.arange(40.0).view(1, 1, 40, 1))}
    cache = DeviceCache(4)
    for wanted in ([0, 1, 2], [3, 4, 5, 6, 7, 8, 9], [0, 9], list(range(40)), [39]):
        found = cache.gather(host, torch.tensor(wanted).view(1, 1, 1, -1), None)
        assert found["key"].flatten().tolist() == wanted
    assert (cache.hits, cache.misses) == (1 + 7 + 1, 3 + 7 + 1 + 33)


def test_device_bytes_are_bounded() -> None:
    """40 cached tokens of each KV head, whatever the prompt; books of 8 bytes a slot twice, and a token once."""
    cached, grown = 40, []
    for prompt in (250, 1000):
        rows = draw(GEOMETRY, [prompt], 3)
        store, plain = pair(rows, cached)
        on_host = HKV * -(-(prompt + 3) // 256) * 256 * (D + DV) * 4
        assert store.host_bytes() == HKV * -(-prompt // 256) * 256 * (D + DV) * 4
        before = store.resident_bytes()
        decode(store, rows, SPEC), decode(plain, rows, SPEC)
        assert store.host_bytes() == on_host and plain.host_bytes() == 0
        cache = HKV * (cached * (D + DV) * 4 + (2 * cached + prompt + 3) * 8)
        assert store.resident_bytes() == plain.resident_bytes() - on_host + cache
        assert before == 0
        grown.append(cache)
    assert grown[1] - grown[0] == HKV * 750 * 8


def test_only_misses_are_copied_and_moving_leaves_the_host_alone() -> None:
    rows = [Row(*(tensor[:, :1].expand(-1, 90, -1) for tensor in draw(GEOMETRY, [1], 0)[0].tensors()), 80)]
    store, _ = pair(rows, 64)
    decode(store, rows, SPEC, range(1))
    assert hits(store) == (
        0,
        HKV * 20,
    )
    decode(store, rows, SPEC, range(1, 2))  # the same query: all but the new token, for which one is left out
    assert hits(store) == (HKV * 19, HKV * 21)
    store.to("meta")
    assert {name: rows.view.device.type for name, rows in store.tokens.items()} == {"key": "cpu", "value": "cpu"}
    assert {tensor.device.type for tensor in store.sequence_index.tensors().values()} == {"meta"}


def test_more_rows_than_before_and_the_longest_gone() -> None:
    rows = draw(GEOMETRY, (12, 40), 6)
    stores = [
        make("clusterkv", GEOMETRY, keep=0.3, tokens_per_cluster=4, sinks=2, window=3, offload=offload, cached=5)
        for offload in ("cpu", "none")
    ]
    outputs = []
    for store in stores:
        prefill(store, rows, SPEC)
        decode(store, rows, SPEC, range(2))
        store.reorder(torch.tensor([0, 0, 0]))
        outputs.append(decode(store, [rows[0]] * 3, SPEC, range(2, 6)))
    for one, other in zip(*outputs, strict=True):
        assert_steps(one, other)


def test_what_is_read_whole_is_missed() -> None:
    """Dense steps copy every token of every KV head from the host, whatever the device has."""
    rows = draw(GEOMETRY, (12, 20), 2)
    store = make("clusterkv", GEOMETRY, keep=1.0, offload="cpu")
    assert store.buffers.device_cache
    prefill(store, rows, SPEC)
    decode(store, rows, SPEC)
    assert hits(store) == (
        0,
        GEOMETRY.kv_heads * (13 + 21 + 14 + 22),
    )
