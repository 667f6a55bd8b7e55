"""A row's list: index and key of every score that reaches a bound, in the row's order.

Part p of a row writes its own from slot p · share on, and how many it wrote to `taken[p]`. Rank j of the list stands
behind the gaps of the parts that end before it.
"""

import triton
import triton.language as tl

from .tile import keys_at, positions, summed_before


@triton.jit
def list_reaching(
    row, begin, end, bound, entries,
    LOWEST: tl.constexpr, UNIT: tl.constexpr, TILE: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Lists the scores in [begin, end) that reach the bound; returns how many."""
    listed = 0
    for start in range(begin, end, TILE):
        position = positions(start, TILE, RUN)
        key = keys_at(row, position, end, LOWEST, UNIT)
        reaching = key >= bound
        before, total = summed_before(reaching.to(tl.int32))
        entry = (key.to(tl.int64) << 32) | position
        tl.store(entries + listed + before, entry, mask=reaching)
        listed += total
    return listed


@triton.jit
def listed_at(
    start, total, entries, taken, parts, share,
    LOWEST: tl.constexpr, MOST_PARTS: tl.constexpr, TILE: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """(keys, indices) of ranks `start` … of the list; LOWEST beyond its total."""
    rank = positions(start, TILE, RUN)
    slot = rank
    end = 0
    for part in tl.static_range(MOST_PARTS):
        length = tl.load(taken + part, mask=part < parts, other=0)
        end += length
        slot += tl.where(rank >= end, share - length, 0)
    # Other multiprocessors wrote these: .cg reads them where they meet, in L2.
    entry = tl.load(entries + slot, mask=rank < total, other=LOWEST << 32, cache_modifier=".cg")
    return (entry >> 32).to(tl.int32), entry.to(tl.int32)


@triton.jit
def kth_listed(
    lowest, k, total, entries, taken, parts, share, LOWEST: tl.constexpr, HIGHEST: tl.constexpr,
    MOST_PARTS: tl.constexpr, TILE: tl.constexpr, RUN: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """(the k-th largest key, how many are larger) of a list of any length, by digits: one pass over it for each.

    k is from 1 to total, and all keys of the list reach `lowest`.
    """
    bin = tl.arange(0, BINS)
    end = HIGHEST + 1  # the k-th largest is in [lowest, end)
    larger = 0
    while lowest + 1 < end:
        # Widths need 32 bits without a sign: differences wrap around to them.
        width = (end - 1 - lowest).to(tl.uint32, bitcast=True)
        shift = tl.full((), 0, tl.int32)
        while width >= BINS:
            width = width >> 1
            shift += 1
        counts = tl.zeros([BINS], tl.int32)
        for start in range(0, total, TILE):
            key, _ = listed_at(
                start, total, entries, taken, parts, share, LOWEST, MOST_PARTS, TILE, RUN
            )  # fmt: skip
            digit = ((key - lowest).to(tl.uint32, bitcast=True) >> shift.to(tl.uint32)).to(tl.int32)
            inside = (key >= lowest) & (key < end)
            counts += tl.histogram(tl.reshape(digit, [TILE]), BINS, mask=tl.reshape(inside, [TILE]))
        reaching = larger + tl.cumsum(counts, 0, reverse=True)
        digit = tl.sum((reaching >= k).to(tl.int32), 0) - 1
        larger += tl.sum(tl.where(bin > digit, counts, 0), 0)
        lowest += digit << shift
        remaining = (end - lowest).to(tl.uint32, bitcast=True)
        end = lowest + tl.minimum(remaining, (1 << shift).to(tl.uint32)).to(tl.int32)
    return lowest, larger
