"""One launch: parts of a row list what reaches a bound; the last of them to finish selects among the listed."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import device_of
from .listing import kth_listed, list_reaching, listed_at
from .tile import count_of, keys_at, kth_largest, positions, sampled_bound, write_chosen

TILE = 8192
"""Scores that one program holds in registers: rows and lists that are no longer are selected from there."""
SAMPLE = 2048
RUN = 8
"""Neighbouring scores of one thread, 16 bytes of float16."""
BINS = 256
MOST_PARTS = 16
GRAIN = 256
"""Scores by which a row is dealt to its parts."""
SMALLEST_PART = 2048
PROGRAMS = 128
"""Programs that a launch aims at: one on each of 132 multiprocessors, whose registers it fills."""
WARPS = 16
KEYS = {torch.float16: (-(1 << 15), 0x7C00), torch.float32: (-(1 << 31), 0x7F800000)}
"""By the scores' dtype: the key that is never chosen, and infinity's."""


@triton.jit(do_not_specialize=["k", "parts", "heads", "units", "slots", "most_share", "scores_sequence", "scores_head"])
def select_kernel(
    scores, lengths, k, index, count, entries, taken, arrivals,
    parts, heads, units, slots, most_share, scores_sequence: tl.int64, scores_head: tl.int64,
    PER_SEQUENCE: tl.constexpr, LOWEST: tl.constexpr, HIGHEST: tl.constexpr, UNIT: tl.constexpr, TILE: tl.constexpr,
    SAMPLE: tl.constexpr, RUN: tl.constexpr, BINS: tl.constexpr, MOST_PARTS: tl.constexpr, GRAIN: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    sequence, head = pair // heads, pair % heads
    row = scores + (sequence * scores_sequence + head * scores_head) * UNIT
    index += pair.to(tl.int64) * slots

    budget = tl.maximum(tl.minimum(tl.load(k + sequence) if PER_SEQUENCE else k, slots), 0)
    length = tl.where(budget > 0, tl.minimum(tl.load(lengths + sequence), units * UNIT), 0)
    bound = tl.full((), LOWEST + 1, tl.int32)  # what every score that can be chosen reaches
    if length <= TILE:
        if part == 0:
            position = positions(0, TILE, RUN)
            key = keys_at(row, position, length, LOWEST, UNIT)
            written = select_tile(key, position, bound, budget, index)
            finish(written, index, slots, count + pair, TILE)
    else:
        bound = sampled_bound(row, length, budget, LOWEST, SAMPLE)
        first_slot = pair.to(tl.int64) * parts * most_share
        entries += first_slot
        taken += pair * MOST_PARTS
        share = tl.cdiv(length, parts * GRAIN) * GRAIN
        begin = part * share
        end = tl.minimum(begin + share, length)
        listed = list_reaching(
            row, begin, end, bound, entries + begin, LOWEST, UNIT, TILE, RUN
        )  # fmt: skip
        tl.store(taken + part, listed)
        tl.debug_barrier()  # every thread's part of the list is written before the one that counts says so
        if tl.atomic_add(arrivals + pair, 1, sem="acq_rel") == parts - 1:
            tl.store(arrivals + pair, 0)
            every_part = tl.arange(0, MOST_PARTS)
            total = tl.sum(tl.load(taken + every_part, mask=every_part < parts, other=0, cache_modifier=".cg"), 0)
            lists = parts
            if (total < budget) & (bound > LOWEST + 1):  # the sample misled: list all, as one part
                bound = tl.full((), LOWEST + 1, tl.int32)
                total = list_reaching(row, 0, length, bound, entries, LOWEST, UNIT, TILE, RUN)
                tl.store(taken, total)
                tl.debug_barrier()
                lists = lists * 0 + 1
            if total <= TILE:
                key, position = listed_at(
                    0, total, entries, taken, lists, share, LOWEST, MOST_PARTS, TILE, RUN
                )  # fmt: skip
                written = select_tile(key, position, bound, budget, index)
            else:
                written = select_list(
                    bound, budget, total, entries, taken, lists, share, index,
                    LOWEST, HIGHEST, MOST_PARTS, TILE, RUN, BINS,
                )  # fmt: skip
            finish(written, index, slots, count + pair, TILE)


@triton.jit
def select_tile(key, position, bound, budget, index):
    """Writes the positions of the largest keys that reach `bound`, at most `budget` of them; returns how many."""
    lowest, reaching = bound, count_of(key >= bound)
    k = tl.minimum(budget, reaching)
    if reaching > k:
        lowest = kth_largest(key, bound, k, 0)
    write_chosen(key, position, lowest, index, 0, 0, k - count_of(key > lowest))
    return k


@triton.jit
def select_list(
    bound, budget, total, entries, taken, parts, share, index, LOWEST: tl.constexpr, HIGHEST: tl.constexpr,
    MOST_PARTS: tl.constexpr, TILE: tl.constexpr, RUN: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """As `select_tile`, for a list of any length whose keys all reach `bound`."""
    k = tl.minimum(budget, total)
    lowest, larger = bound - 1, k
    if total > k:
        lowest, larger = kth_listed(
            bound, k, total, entries, taken, parts, share, LOWEST, HIGHEST, MOST_PARTS, TILE, RUN, BINS
        )  # fmt: skip
    ties = k - larger
    start, above, equal = 0, 0, 0
    while (start < total) & (above + tl.minimum(equal, ties) < k):
        key, position = listed_at(
            start, total, entries, taken, parts, share, LOWEST, MOST_PARTS, TILE, RUN
        )  # fmt: skip
        above, equal = write_chosen(key, position, lowest, index, above, equal, ties)
        start += TILE
    return k


@triton.jit
def finish(written, index, slots, count, TILE: tl.constexpr):
    tl.store(count, written)
    for start in range(written, slots, TILE):
        slot = start + tl.arange(0, TILE)
        tl.store(index + slot, tl.zeros([TILE], tl.int32), mask=slot < slots)


def parts_of(pairs: int, tokens: int) -> int:
    """Programs of each (sequence, head), from shapes alone: see README.md."""
    if tokens <= TILE:
        return 1
    return max(1, min(PROGRAMS // pairs, MOST_PARTS, triton.cdiv(tokens, SMALLEST_PART)))


def select(
    scores: Tensor, k: int | Tensor, lengths: Tensor, index: Tensor, count: Tensor, arrivals: Tensor | None
) -> None:
    """Writes `index` and `count`, already checked; see `kvcal.kernels.select.select`."""
    batch, heads, tokens = scores.shape
    pairs = batch * heads
    lowest, highest = KEYS[scores.dtype]
    parts = parts_of(pairs, tokens)
    most_share = triton.cdiv(tokens, parts * GRAIN) * GRAIN
    slots = pairs * parts * most_share if tokens > TILE else 0
    entries = torch.empty(slots, dtype=torch.int64, device=scores.device)
    taken = torch.empty(pairs * MOST_PARTS, dtype=torch.int32, device=scores.device)
    if arrivals is None:
        arrivals = torch.zeros(pairs, dtype=torch.int32, device=scores.device) if tokens > TILE else taken
    # Strides and lengths in units of 16 bytes tell the compiler that rows are aligned, whatever their values.
    unit = 16 // scores.element_size()
    if any(size % unit for size in (tokens, *scores.stride()[:2])):
        unit = 1
    with device_of(scores):
        select_kernel[(pairs * parts,)](
            scores, lengths, k, index, count, entries, taken, arrivals,
            parts, heads, tokens // unit, index.shape[-1], most_share,
            scores.stride(0) // unit, scores.stride(1) // unit,
            PER_SEQUENCE=isinstance(k, Tensor), LOWEST=lowest, HIGHEST=highest, UNIT=unit, TILE=TILE, SAMPLE=SAMPLE,
            RUN=RUN, BINS=BINS, MOST_PARTS=MOST_PARTS, GRAIN=GRAIN, num_warps=WARPS,
        )  # fmt: skip
