"""What `spectral` holds and reads, counted by hand."""

from __future__ import annotations

from math import ceil
from typing import Any

import pytest
import torch
from sequences import Geometry, decode, draw, make, prefill

from kvcal.runtime.attention import Logits
from kvcal.runtime.stores.spectral import SpectralStore

D, DV, HKV, G = 64, 32, 2, 3
GEOMETRY, LOGITS = Geometry(D, DV, HKV, G), Logits(0.125)
R, B = 16, 2  # dimensions of a code; bytes of a number of the cache
PROMPT, STEPS, KEEP, PER_CLUSTER, SINKS, RECENT = 600, 20, 48, 7, 4, 12
N = PROMPT + STEPS
CLUSTERED, CLUSTERS = PROMPT - SINKS, round((PROMPT - SINKS) / PER_CLUSTER)
OPEN = 4 * DV
"""The sum of the values in the open window, in float32."""
MEAN_KEY, MEAN_VALUE, SIZE = R // 2 + 2 + 2, DV + 2, 4
"""Of a cluster: codes of 4 bits, a scale and a radius of two bytes each; codes of 8 bits and a scale; an int32."""
BASIS = HKV * ((2 * R * D + D + R) * B + 4)
"""Both maps, the mean key, what the key map makes of it, and the float32 variance of what is left out."""


def after_steps(dtype: torch.dtype = torch.bfloat16, **settings: Any) -> SpectralStore:
    rows = draw(GEOMETRY, [PROMPT], STEPS, dtype=dtype)
    chosen = {"keep": KEEP, "rank": R, "tokens_per_cluster": PER_CLUSTER, "recent": RECENT, **settings}
    store = make("spectral", GEOMETRY, **chosen)
    assert isinstance(store, SpectralStore)
    prefill(store, rows, LOGITS)
    decode(store, rows, LOGITS)
    return store


def code(bits: int) -> int:
    """Bytes of a token's code and its scale."""
    return R * bits // 8 + 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_held(bits: int, dtype: torch.dtype) -> None:
    """In buffers that grow by 256 tokens, and by the clusters of as many."""
    growth = ceil(256 / PER_CLUSTER)
    clusters = ceil(CLUSTERS / growth) * growth * (MEAN_KEY + MEAN_VALUE + SIZE)
    vectors, beside = ceil(N / 256) * 256 * (D + DV) * B, ceil(N / 256) * 256 * (4 + code(bits))
    store = after_steps(dtype, bits=bits)
    assert store.resident_bytes() == HKV * (vectors + beside + clusters + OPEN)
    offloaded = after_steps(dtype, bits=bits, offload="cpu", cached=100)
    assert offloaded.host_bytes() == HKV * vectors
    cache = 100 * (D + DV) * B + (2 * 100 + N) * 8
    assert offloaded.resident_bytes() == HKV * (beside + clusters + OPEN + cache)
    assert offloaded.bytes_read() == store.bytes_read()


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize(("select", "readers"), [("head", HKV * G), ("group", HKV), ("max", HKV)])
@pytest.mark.parametrize("bits", [2, 4])
def test_read_flat(bits: int, select: str, readers: int, tail: bool) -> None:
    """The codes of all but sinks and recent tokens once per KV head, whoever chooses; mean values for the tail."""
    store = after_steps(bits=bits, select=select, tail=tail)
    read = HKV * ((N - SINKS - RECENT) * code(bits) + CLUSTERS * SIZE) + readers * KEEP * (D + DV) * B + BASIS
    if tail:
        read += HKV * (CLUSTERS * MEAN_VALUE + OPEN)
    assert store.bytes_read() == read
    assert int(store.read_mask().sum()) == readers * KEEP


@pytest.mark.parametrize(("refine", "refined"), [(0.25, CLUSTERED // 4), (5, KEEP - SINKS - RECENT)])
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize(("select", "readers"), [("head", HKV * G), ("group", HKV), ("max", HKV)])
def test_read_by_two_levels(select: str, readers: int, tail: bool, refine: float, refined: int) -> None:
    """All mean keys; then the codes of what is refined, by head its own, never fewer than are chosen."""
    store = after_steps(select=select, tail=tail, refine=refine, flat_below=0)
    read = HKV * CLUSTERS * (SIZE + MEAN_KEY) + readers * (refined + STEPS - RECENT) * code(2) + BASIS
    read += readers * KEEP * (D + DV) * B
    if tail:
        read += HKV * (CLUSTERS * MEAN_VALUE + OPEN)
    assert store.bytes_read() == read


def test_read_whole() -> None:
    assert after_steps(dense_below=1000).bytes_read() == HKV * N * (D + DV) * B
