"""One program per (sequence, KV head) stores the new key and value."""

import triton
import triton.language as tl
from torch import Tensor

from .. import pages
from ..backend import device_of
from ..pages.table import capacity_of

WARPS = 4
PAGE = tl.constexpr(pages.PAGE)
VARYING = [
    *(f"{cache}_{along}" for cache in ("key", "value") for along in ("sequence", "head")),
    *("capacity", "table", "table_sequence"),
]
"""What grows with the capacity of a cache, and must not compile the kernel again."""


@triton.jit(do_not_specialize=VARYING)
def append_kernel(
    key_new, value_new, key, value, lengths, table, capacity: tl.int64,
    key_new_sequence: tl.int64, key_new_head: tl.int64, value_new_sequence: tl.int64, value_new_head: tl.int64,
    key_sequence: tl.int64, key_head: tl.int64, key_token: tl.int64,
    value_sequence: tl.int64, value_head: tl.int64, value_token: tl.int64, table_sequence,
    D: tl.constexpr, DV: tl.constexpr, PADDED_D: tl.constexpr, PADDED_DV: tl.constexpr, PAGED: tl.constexpr,
):  # fmt: skip
    head, sequence = tl.program_id(0), tl.program_id(1)
    slot = tl.load(lengths + sequence).to(tl.int64)
    if (slot < 0) | (slot >= capacity):
        return
    key_new += sequence * key_new_sequence + head * key_new_head
    value_new += sequence * value_new_sequence + head * value_new_head
    place = sequence
    if PAGED:
        place = tl.load(table + sequence.to(tl.int64) * table_sequence + slot // PAGE).to(tl.int64)
        slot %= PAGE
    dim = tl.arange(0, PADDED_D)
    numbers = tl.load(key_new + dim, mask=dim < D)
    to = key + place * key_sequence + head * key_head + slot * key_token + dim
    tl.store(to, numbers.to(tl.float32).to(key.dtype.element_ty), mask=dim < D)
    dim = tl.arange(0, PADDED_DV)
    numbers = tl.load(value_new + dim, mask=dim < DV)
    to = value + place * value_sequence + head * value_head + slot * value_token + dim
    tl.store(to, numbers.to(tl.float32).to(value.dtype.element_ty), mask=dim < DV)


def append(
    key_new: Tensor, value_new: Tensor, key: Tensor, value: Tensor, lengths: Tensor, table: Tensor | None
) -> None:
    """Writes into the caches, already checked; see `kvcal.kernels.append.append`."""
    batch, heads, head_dim = key_new.shape
    with device_of(key):
        append_kernel[(heads, batch)](
            key_new, value_new, key, value, lengths, table, capacity_of(key, table),
            *key_new.stride()[:2], *value_new.stride()[:2], *key.stride()[:3], *value.stride()[:3],
            0 if table is None else table.stride(0),
            D=head_dim, DV=value.shape[-1], PADDED_D=triton.next_power_of_2(head_dim),
            PADDED_DV=triton.next_power_of_2(value.shape[-1]), PAGED=table is not None, num_warps=WARPS,
        )  # fmt: skip
