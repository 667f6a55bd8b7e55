"""One program per (row, KV head) stores the new key and value and their entry of the index."""

import triton
import triton.language as tl
from torch import Tensor

from ..backend import device_of

WARPS = 4
PRODUCTS = 8192
"""Numbers of the map that a program holds at a time: 64 registers of each of 128 threads."""
VARYING = ["capacity", *(f"{cache}_{along}" for cache in ("key", "value", "index") for along in ("row", "head"))]
"""What grows with the capacity of a cache, and must not compile the kernel again."""


@triton.jit
def projection(key_new, map, dims, inside, D: tl.constexpr, STEP: tl.constexpr, MAPPED: tl.constexpr):
    """The dimensions `dims` of the index, float32: of the product with the map, or of the key itself."""
    if MAPPED:
        total = tl.zeros(dims.shape, dtype=tl.float32)
        for begin in tl.static_range(0, D, STEP):
            dim = begin + tl.arange(0, STEP)
            entries = tl.load(
                map + dims[:, None] * D + dim[None, :], mask=inside[:, None] & (dim < D)[None, :], other=0.0
            )
            key = tl.load(key_new + dim, mask=dim < D, other=0.0)
            total += tl.sum(entries.to(tl.float32) * key.to(tl.float32)[None, :], 1)
    else:
        total = tl.load(key_new + dims, mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit(do_not_specialize=VARYING)
def append_kernel(
    key_new, value_new, map, key, value, index, lengths, active, capacity: tl.int64,
    key_new_row: tl.int64, key_new_head: tl.int64, value_new_row: tl.int64, value_new_head: tl.int64,
    key_row: tl.int64, key_head: tl.int64, key_token: tl.int64,
    value_row: tl.int64, value_head: tl.int64, value_token: tl.int64,
    index_row: tl.int64, index_head: tl.int64, index_token: tl.int64,
    D: tl.constexpr, DV: tl.constexpr, PADDED_D: tl.constexpr, PADDED_DV: tl.constexpr,
    RANK: tl.constexpr, PADDED: tl.constexpr, STEP: tl.constexpr,
    INDEX: tl.constexpr, MAPPED: tl.constexpr, ACTIVE: tl.constexpr,
):  # fmt: skip
    head, row = tl.program_id(0), tl.program_id(1)
    slot = tl.load(lengths + row).to(tl.int64)
    written = (slot >= 0) & (slot < capacity)
    if ACTIVE:
        written &= tl.load(active + row) != 0
    if not written:
        return
    key_new += row * key_new_row + head * key_new_head
    value_new += row * value_new_row + head * value_new_head
    dim = tl.arange(0, PADDED_D)
    numbers = tl.load(key_new + dim, mask=dim < D)
    to = key + row * key_row + head * key_head + slot * key_token + dim
    tl.store(to, numbers.to(tl.float32).to(key.dtype.element_ty), mask=dim < D)
    dim = tl.arange(0, PADDED_DV)
    numbers = tl.load(value_new + dim, mask=dim < DV)
    to = value + row * value_row + head * value_head + slot * value_token + dim
    tl.store(to, numbers.to(tl.float32).to(value.dtype.element_ty), mask=dim < DV)
    if INDEX:
        if MAPPED:
            map += head * RANK * D
        dims = tl.arange(0, PADDED)
        inside = dims < RANK
        entry = projection(key_new, map, dims, inside, D, STEP, MAPPED)
        to = index + row * index_row + head * index_head + slot * index_token + dims
        tl.store(to, entry.to(index.dtype.element_ty), mask=inside)


def append(
    key_new: Tensor,
    value_new: Tensor,
    map: Tensor | None,
    key: Tensor,
    value: Tensor,
    index: Tensor | None,
    lengths: Tensor,
    active: Tensor | None,
) -> None:
    """Writes into the caches, already checked; see `kvcal.kernels.append.append`."""
    batch, heads, capacity, head_dim = key.shape
    rank = 1 if index is None else index.shape[-1]
    padded = triton.next_power_of_2(rank)
    padded_dim = triton.next_power_of_2(head_dim)
    with device_of(key):
        append_kernel[(heads, batch)](
            key_new, value_new, map, key, value, index, lengths, active, capacity,
            *key_new.stride()[:2], *value_new.stride()[:2], *key.stride()[:3], *value.stride()[:3],
            *((0, 0, 0) if index is None else index.stride()[:3]),
            D=head_dim, DV=value.shape[-1], PADDED_D=padded_dim, PADDED_DV=triton.next_power_of_2(value.shape[-1]),
            RANK=rank, PADDED=padded, STEP=max(16, min(padded_dim, PRODUCTS // padded)),
            INDEX=index is not None, MAPPED=map is not None, ACTIVE=active is not None, num_warps=WARPS,
        )  # fmt: skip
