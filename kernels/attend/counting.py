"""How many tokens of each cluster a selection leaves unread: what `tail` takes, counted where the selection is."""

import triton
import triton.language as tl
from torch import Tensor

from ..backend import device_of

TILE = 1024
WARPS = 8


@triton.jit(do_not_specialize=[
    "heads", "sharing", "chosen", "clusters",
    *(f"{of}_{along}" for of in ("owner", "sizes") for along in ("row", "head")),
])  # fmt: skip
def unread_kernel(
    index_ptr, count_ptr, owner_ptr, sizes_ptr, begin_ptr, end_ptr, out_ptr, heads, sharing, chosen, clusters,
    owner_row: tl.int64, owner_head: tl.int64, sizes_row: tl.int64, sizes_head: tl.int64, TILE: tl.constexpr,
):  # fmt: skip
    """One program: the selection of one group."""
    group = tl.program_id(0)
    row, head = group // sharing // heads, group // sharing % heads
    index_ptr += group.to(tl.int64) * chosen
    out_ptr += group.to(tl.int64) * clusters
    owner_ptr += row * owner_row + head * owner_head
    sizes_ptr += row * sizes_row + head * sizes_head
    for first in range(0, clusters, TILE):
        cluster = first + tl.arange(0, TILE)
        size = tl.load(sizes_ptr + cluster, mask=cluster < clusters, other=0)
        tl.store(out_ptr + cluster, size.to(tl.float32), mask=cluster < clusters)
    tl.debug_barrier()  # every thread's sizes are there before any other takes from them
    begin, end = tl.load(begin_ptr + row), tl.load(end_ptr + row)
    count = tl.minimum(tl.load(count_ptr + group), chosen)
    for first in range(0, count, TILE):
        rank = first + tl.arange(0, TILE)
        slot = tl.load(index_ptr + rank, mask=rank < count, other=-1)
        clustered = (rank < count) & (slot >= begin) & (slot < end)
        cluster = tl.load(owner_ptr + slot, mask=clustered, other=0)
        tl.atomic_add(out_ptr + cluster, tl.full([TILE], -1.0, tl.float32), mask=clustered, sem="relaxed")


def unread(
    index: Tensor, count: Tensor, owner: Tensor, sizes: Tensor, begin: Tensor, end: Tensor, out: Tensor
) -> Tensor:
    groups = count.numel()
    heads = owner.shape[1]
    with device_of(index):
        unread_kernel[(groups,)](
            index.contiguous(), count.contiguous(), owner, sizes, begin.contiguous(), end.contiguous(), out,
            heads, groups // (owner.shape[0] * heads), index.shape[-1], sizes.shape[-1],
            *owner.stride()[:2], *sizes.stride()[:2], TILE=TILE, num_warps=WARPS,
        )  # fmt: skip
    return out
