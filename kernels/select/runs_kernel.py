"""`select_runs` in one launch: each row's program finds the score at which its room is full, then trims the ties."""

import triton
import triton.language as tl
from torch import Tensor

from ..backend import device_of
from .tile import keys_at, positions, summed_before
from .triton_kernel import KEYS

TILES = {2048: 8, 8192: 16}
"""Clusters that a program holds in registers, and its warps; longer rows are read from memory in every pass."""
RUN = 8
"""Neighbours of one thread."""
LEADING = 16
"""Runs that may come before the chosen ones."""


@triton.jit
def clusters_at(row, sizes, position, length, LOWEST: tl.constexpr, UNIT: tl.constexpr):
    """(keys, sizes); what cannot be chosen has the key LOWEST, what is not there a size of 0."""
    present = position < tl.cdiv(length, UNIT) * UNIT
    size = tl.load(sizes + position, mask=present, other=0)
    size = tl.where(position < length, tl.maximum(size, 0), 0)
    key = keys_at(row, position, length, LOWEST, UNIT)
    return tl.where(size > 0, key, LOWEST), size


@triton.jit
def weight_of(key, size, bound, BY_SIZE: tl.constexpr):
    """[…] int64: of keys that reach the bound, their size, or 1."""
    return tl.where(key >= bound, size if BY_SIZE else 1, 0).to(tl.int64)


@triton.jit
def summed(numbers):
    return tl.sum(tl.ravel(numbers, can_reorder=True), 0)


@triton.jit
def thirds(lowest, above):
    width = (above - lowest).to(tl.uint32, bitcast=True)  # up to 32 bits, without a sign
    third = tl.maximum(width // 3, 1).to(tl.int32)
    return lowest + third, above - third


@triton.jit
def narrowed(lowest, above, low, high, reaching, wanted):
    """The third of [lowest, above) in which the bound is; `reaching`: low's sum, and high's in the upper 32 bits."""
    reaching_low, reaching_high = reaching.to(tl.int32), (reaching >> 32).to(tl.int32)
    up = reaching_high >= wanted
    middle = reaching_low >= wanted
    exact = (reaching_high == wanted) | ((~up) & (reaching_low == wanted))
    lowest = tl.where(up, high, tl.where(middle, low, lowest))
    above = tl.where(up, above, tl.where(middle, high, low))
    return lowest, tl.where(exact, lowest + 1, above)


@triton.jit
def bound_of_tile(key, size, lowest, above, wanted, BY_SIZE: tl.constexpr):
    """The largest bound in [lowest, above), or one as good, that keys of the `wanted` weight reach; `lowest` is one."""
    while lowest + 1 < above:
        low, high = thirds(lowest, above)
        both = weight_of(key, size, low, BY_SIZE) + (weight_of(key, size, high, BY_SIZE) << 32)
        lowest, above = narrowed(lowest, above, low, high, summed(both), wanted)
    return lowest


@triton.jit
def bound_of_row(
    row, sizes, length, lowest, above, wanted,
    BY_SIZE: tl.constexpr, LOWEST: tl.constexpr, UNIT: tl.constexpr, TILE: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """As `bound_of_tile`, by passes over the row."""
    while lowest + 1 < above:
        low, high = thirds(lowest, above)
        both = tl.zeros([TILE // RUN, RUN], tl.int64)
        for start in range(0, length, TILE):
            key, size = clusters_at(row, sizes, positions(start, TILE, RUN), length, LOWEST, UNIT)
            both += weight_of(key, size, low, BY_SIZE) + (weight_of(key, size, high, BY_SIZE) << 32)
        lowest, above = narrowed(lowest, above, low, high, summed(both), wanted)
    return lowest


@triton.jit
def write_taken(
    key, size, position, bound, room, ties, tied, written, width, starts, out_starts, out_sizes, unread,
    UNREAD: tl.constexpr,
):  # fmt: skip
    """What is taken of a tile: all above the bound, and of those that equal it the first `ties`, while there is room.

    Args: room: for those that equal the bound; tied: their tokens, and in the upper 32 bits how many, in earlier tiles.

    Returns: (tied, written) with this tile's.
    """
    tie = key == bound
    before, total = summed_before(tl.where(tie, size.to(tl.int64) + (tie.to(tl.int64) << 32), 0))
    before += tied
    left = tl.maximum(room - before.to(tl.int32), 0)
    of_tie = tl.where(tie & ((before >> 32).to(tl.int32) < ties), tl.minimum(size, left), 0)
    taken = tl.where(key > bound, size, of_tie)
    if UNREAD:
        tl.store(unread + position, (size - taken).to(tl.float32), mask=position < width)
    chosen = taken > 0
    slot, number = summed_before(chosen.to(tl.int32))
    start = tl.load(starts + position, mask=chosen, other=0)
    tl.store(out_starts + written + slot, start, mask=chosen)
    tl.store(out_sizes + written + slot, taken, mask=chosen)
    return tied + total, written + number


@triton.jit
def take_of_tile(
    row, sizes, length, wanted, slots, width, starts, out_starts, out_sizes, unread,
    UNREAD: tl.constexpr, LOWEST: tl.constexpr, UNIT: tl.constexpr, TILE: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Writes what a row of at most TILE clusters takes; returns how many."""
    position = positions(0, TILE, RUN)
    key, size = clusters_at(row, sizes, position, length, LOWEST, UNIT)
    bound = tl.full((), LOWEST, tl.int32)
    least = bound + 1
    above = tl.max(tl.ravel(key, can_reorder=True), 0) + 1
    if wanted == 0:
        bound = above
    elif summed(weight_of(key, size, least, True)).to(tl.int32) > wanted:
        bound = bound_of_tile(key, size, least, above, wanted, True)
    reaching = tl.maximum(bound, least)
    if summed(weight_of(key, size, reaching, False)).to(tl.int32) > slots:
        bound = bound_of_tile(key, size, reaching, above, slots, False)
    larger = summed(weight_of(key, size, bound + 1, True) + (weight_of(key, size, bound + 1, False) << 32))
    ties = tl.where((bound > LOWEST) & (wanted > 0), slots - (larger >> 32).to(tl.int32), 0)
    _, written = write_taken(
        key, size, position, bound, wanted - larger.to(tl.int32), ties, larger * 0, length * 0, width,
        starts, out_starts, out_sizes, unread, UNREAD,
    )  # fmt: skip
    return written


@triton.jit
def reaching_in_row(
    row, sizes, length, bound,
    LOWEST: tl.constexpr, UNIT: tl.constexpr, TILE: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """int64: tokens of the clusters that reach the bound, and in the upper 32 bits how many there are."""
    both = tl.zeros([TILE // RUN, RUN], tl.int64)
    for start in range(0, length, TILE):
        key, size = clusters_at(row, sizes, positions(start, TILE, RUN), length, LOWEST, UNIT)
        both += weight_of(key, size, bound, True) + (weight_of(key, size, bound, False) << 32)
    return summed(both)


@triton.jit
def take_of_row(
    row, sizes, length, wanted, slots, width, starts, out_starts, out_sizes, unread,
    UNREAD: tl.constexpr, LOWEST: tl.constexpr, HIGHEST: tl.constexpr, UNIT: tl.constexpr,
    TILE: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """As `take_of_tile`, for a row of any length."""
    bound = tl.full((), LOWEST, tl.int32)
    least = bound + 1
    above = tl.full((), HIGHEST + 1, tl.int32)
    if wanted == 0:
        bound = above
    elif reaching_in_row(row, sizes, length, least, LOWEST, UNIT, TILE, RUN).to(tl.int32) > wanted:
        bound = bound_of_row(row, sizes, length, least, above, wanted, True, LOWEST, UNIT, TILE, RUN)
    reaching = tl.maximum(bound, least)
    if (reaching_in_row(row, sizes, length, reaching, LOWEST, UNIT, TILE, RUN) >> 32).to(tl.int32) > slots:
        bound = bound_of_row(row, sizes, length, reaching, above, slots, False, LOWEST, UNIT, TILE, RUN)
    larger = reaching_in_row(row, sizes, length, bound + 1, LOWEST, UNIT, TILE, RUN)
    ties = tl.where((bound > LOWEST) & (wanted > 0), slots - (larger >> 32).to(tl.int32), 0)
    tied, written = larger * 0, length * 0
    for start in range(0, length, TILE):
        position = positions(start, TILE, RUN)
        key, size = clusters_at(row, sizes, position, length, LOWEST, UNIT)
        tied, written = write_taken(
            key, size, position, bound, wanted - larger.to(tl.int32), ties, tied, written, width,
            starts, out_starts, out_sizes, unread, UNREAD,
        )  # fmt: skip
    return written


@triton.jit(do_not_specialize=[
    "heads", "starts_sharing", "sizes_sharing", "units", "slots", "leading", "room_row", "room_head",
    *(f"{of}_{along}" for of in ("scores", "starts", "sizes") for along in ("row", "head")),
])  # fmt: skip
def runs_kernel(
    scores, starts, sizes, room, counts, lead_starts, lead_sizes, out_starts, out_sizes, out_count, unread,
    heads, starts_sharing, sizes_sharing, units, slots, leading, room_row, room_head,
    scores_row: tl.int64, scores_head: tl.int64, starts_row: tl.int64, starts_head: tl.int64,
    sizes_row: tl.int64, sizes_head: tl.int64,
    UNREAD: tl.constexpr, LOWEST: tl.constexpr, HIGHEST: tl.constexpr, UNIT: tl.constexpr,
    LEADING: tl.constexpr, TILE: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    batch, head = pair // heads, pair % heads
    width = units * UNIT
    row = scores + (batch * scores_row + head * scores_head) * UNIT
    starts += batch * starts_row + head // starts_sharing * starts_head
    sizes += (batch * sizes_row + head // sizes_sharing * sizes_head) * UNIT
    out_starts += pair.to(tl.int64) * (leading + slots)
    out_sizes += pair.to(tl.int64) * (leading + slots)
    unread += pair.to(tl.int64) * width

    lead = tl.arange(0, LEADING)
    tl.store(out_starts + lead, tl.load(lead_starts + batch * leading + lead, mask=lead < leading), mask=lead < leading)
    tl.store(out_sizes + lead, tl.load(lead_sizes + batch * leading + lead, mask=lead < leading), mask=lead < leading)
    out_starts += leading
    out_sizes += leading

    wanted = tl.maximum(tl.load(room + batch * room_row + head * room_head), 0)
    length = tl.maximum(tl.minimum(tl.load(counts + batch), width), 0)
    if length <= TILE:
        written = take_of_tile(
            row, sizes, length, wanted, slots, width, starts, out_starts, out_sizes, unread, UNREAD,
            LOWEST, UNIT, TILE, RUN,
        )  # fmt: skip
    else:
        written = take_of_row(
            row, sizes, length, wanted, slots, width, starts, out_starts, out_sizes, unread, UNREAD,
            LOWEST, HIGHEST, UNIT, TILE, RUN,
        )  # fmt: skip
    tl.store(out_count + pair, leading + written)
    if UNREAD:
        for start in range(tl.maximum(tl.cdiv(length, TILE), 1) * TILE, width, TILE):
            cluster = start + tl.arange(0, TILE)
            tl.store(unread + cluster, tl.zeros([TILE], tl.float32), mask=cluster < width)
    for start in range(written, slots, TILE):
        slot = start + tl.arange(0, TILE)
        tl.store(out_starts + slot, tl.zeros([TILE], tl.int32), mask=slot < slots)
        tl.store(out_sizes + slot, tl.zeros([TILE], tl.int32), mask=slot < slots)


def select_runs(
    scores: Tensor,
    starts: Tensor,
    sizes: Tensor,
    room: Tensor,
    counts: Tensor,
    leading: tuple[Tensor, Tensor] | None,
    out: tuple[Tensor, Tensor, Tensor],
    unread: Tensor | None,
) -> None:
    """Writes `out` and `unread`, already checked; see `kvcal.kernels.select.select_runs`."""
    batch, heads, clusters = scores.shape
    lowest, highest = KEYS[scores.dtype]
    first = 0 if leading is None else leading[0].shape[-1]
    # Strides in units of 16 bytes tell the compiler that rows are aligned, whatever their values.
    unit = 16 // scores.element_size()
    if any(size % unit for size in (clusters, *scores.stride()[:2], *sizes.stride()[:2])):
        unit = 1
    tile = min((tile for tile in TILES if tile >= clusters), default=max(TILES))
    with device_of(scores):
        runs_kernel[(batch * heads,)](
            scores, starts, sizes, room, counts, *(leading or out[:2]), *out, out[1] if unread is None else unread,
            heads, heads // starts.shape[1], heads // sizes.shape[1], clusters // unit, out[0].shape[-1] - first, first,
            room.stride(0), room.stride(1) if room.dim() == 2 else 0,
            scores.stride(0) // unit, scores.stride(1) // unit, *starts.stride()[:2],
            sizes.stride(0) // unit, sizes.stride(1) // unit,
            UNREAD=unread is not None, LOWEST=lowest, HIGHEST=highest, UNIT=unit,
            LEADING=LEADING, TILE=tile, RUN=RUN, num_warps=TILES[tile],
        )  # fmt: skip
