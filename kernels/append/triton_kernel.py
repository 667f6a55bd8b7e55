"""One program per (row, KV head) stores the new key and value and their entry of the index."""

import triton
import triton.language as tl
from torch import Tensor

from ..backend import device_of
from ..score.quantize import FIRST, LARGEST, LARGEST_SCALE, LAST, ROUNDING, ZERO, fields_of

WARPS = 4
PRODUCTS = 8192
"""Numbers of the map that a program holds at a time: 64 registers of each of 128 threads."""
VARYING = [
    "capacity",
    "summed_from",
    *(f"{cache}_{along}" for cache in ("key", "value", "codes", "scales") for along in ("row", "head")),
]
"""What grows with the capacity of a cache, and must not compile the kernel again."""


@triton.jit
def projection(
    key_new, map, offset, dims, inside, D: tl.constexpr, STEP: tl.constexpr, MAPPED: tl.constexpr, OFFSET: tl.constexpr
):  # fmt: skip
    """The dimensions `dims` of the index, float32: of the product with the map, or of the key itself; less `offset`."""
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
    if OFFSET:
        total -= tl.load(offset + dims, mask=inside, other=0.0)
    return total


@triton.jit
def integers(
    numbers, scale, ROUNDING: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, ZERO: tl.constexpr
):  # fmt: skip
    rounded = tl.where(scale > 0, tl.floor(numbers / tl.where(scale > 0, scale, 1.0) + ROUNDING), 0.0)
    return tl.minimum(tl.maximum(rounded, FIRST), LAST).to(tl.int32) + ZERO


@triton.jit(do_not_specialize=VARYING)
def append_kernel(
    key_new, value_new, map, key, value, codes, scales, lengths, active, offset, value_sum,
    capacity: tl.int64, summed_from, clip,
    key_new_row: tl.int64, key_new_head: tl.int64, value_new_row: tl.int64, value_new_head: tl.int64,
    key_row: tl.int64, key_head: tl.int64, key_token: tl.int64,
    value_row: tl.int64, value_head: tl.int64, value_token: tl.int64,
    codes_row: tl.int64, codes_head: tl.int64, codes_token: tl.int64,
    scales_row: tl.int64, scales_head: tl.int64, scales_token: tl.int64,
    D: tl.constexpr, DV: tl.constexpr, PADDED_D: tl.constexpr, PADDED_DV: tl.constexpr,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, STEP: tl.constexpr, BITS: tl.constexpr, FIELDS: tl.constexpr,
    LARGEST: tl.constexpr, LARGEST_SCALE: tl.constexpr, ROUNDING: tl.constexpr, FIRST: tl.constexpr,
    LAST: tl.constexpr, ZERO: tl.constexpr, MAPPED: tl.constexpr, ACTIVE: tl.constexpr,
    OFFSET: tl.constexpr, SUMMED: tl.constexpr,
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
    if SUMMED:
        sums = value_sum + (row * tl.num_programs(0) + head) * DV + dim
        adds = (dim < DV) & (slot >= summed_from)
        tl.store(sums, tl.load(sums, mask=adds, other=0.0) + numbers.to(tl.float32), mask=adds)

    if BITS != 0:
        if MAPPED:
            map += head * (FIELDS * WIDTH) * D
        if OFFSET:
            offset += head * (FIELDS * WIDTH)
        dims = tl.arange(0, PADDED)
        inside = dims < WIDTH
        codes += row * codes_row + head * codes_head + slot * codes_token + dims
        low = projection(key_new, map, offset, dims, inside, D, STEP, MAPPED, OFFSET)
        if BITS == 16:
            tl.store(codes, low.to(codes.dtype.element_ty), mask=inside)
        else:
            scales += row * scales_row + head * scales_head + slot * scales_token
            # All fields of a byte in one lane: each part of the index is a product of its own.
            largest = tl.max(tl.abs(low), 0)
            if BITS <= 4:
                second = projection(key_new, map, offset, dims + WIDTH, inside, D, STEP, MAPPED, OFFSET)
                largest = tl.maximum(largest, tl.max(tl.abs(second), 0))
            if BITS == 2:
                third = projection(key_new, map, offset, dims + 2 * WIDTH, inside, D, STEP, MAPPED, OFFSET)
                largest = tl.maximum(largest, tl.max(tl.abs(third), 0))
                fourth = projection(key_new, map, offset, dims + 3 * WIDTH, inside, D, STEP, MAPPED, OFFSET)
                largest = tl.maximum(largest, tl.max(tl.abs(fourth), 0))
            scale = tl.minimum(largest * clip / LARGEST, LARGEST_SCALE).to(tl.float16)
            tl.store(scales, scale)
            scale = scale.to(tl.float32)
            code = integers(low, scale, ROUNDING, FIRST, LAST, ZERO)
            if BITS <= 4:
                code |= integers(second, scale, ROUNDING, FIRST, LAST, ZERO) << BITS
            if BITS == 2:
                code |= integers(third, scale, ROUNDING, FIRST, LAST, ZERO) << 4
                code |= integers(fourth, scale, ROUNDING, FIRST, LAST, ZERO) << 6
            tl.store(codes, code.to(codes.dtype.element_ty), mask=inside)


def append(
    key_new: Tensor,
    value_new: Tensor,
    map: Tensor | None,
    key: Tensor,
    value: Tensor,
    codes: Tensor | None,
    scales: Tensor | None,
    lengths: Tensor,
    active: Tensor | None,
    bits: int,
    clip: float,
    offset: Tensor | None,
    value_sum: Tensor | None,
    summed_from: int,
) -> None:
    """Writes into the caches and `value_sum`, already checked; see `kvcal.kernels.append.append`."""
    batch, heads, capacity, head_dim = key.shape
    bits = 0 if codes is None else bits
    width = 1 if codes is None else codes.shape[-1]
    padded = triton.next_power_of_2(width)
    padded_dim = triton.next_power_of_2(head_dim)
    nothing = (0, 0, 0)
    with device_of(key):
        append_kernel[(heads, batch)](
            key_new, value_new, map, key, value, codes, scales, lengths, active, offset, value_sum,
            capacity, summed_from, float(clip),
            *key_new.stride()[:2], *value_new.stride()[:2], *key.stride()[:3], *value.stride()[:3],
            *(nothing if codes is None else codes.stride()[:3]), *(nothing if scales is None else scales.stride()),
            D=head_dim, DV=value.shape[-1], PADDED_D=padded_dim, PADDED_DV=triton.next_power_of_2(value.shape[-1]),
            WIDTH=width, PADDED=padded, STEP=max(16, min(padded_dim, PRODUCTS // padded)), BITS=bits,
            FIELDS=fields_of(bits) if bits else 1, LARGEST=LARGEST.get(bits, 1), LARGEST_SCALE=LARGEST_SCALE,
            ROUNDING=ROUNDING.get(bits, 0.0), FIRST=FIRST.get(bits, 0), LAST=LAST.get(bits, 0), ZERO=ZERO.get(bits, 0),
            MAPPED=map is not None,
            ACTIVE=active is not None, OFFSET=offset is not None, SUMMED=value_sum is not None, num_warps=WARPS,
        )  # fmt: skip
