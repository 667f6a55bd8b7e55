"""Slots of the chosen candidates, and which of the scores remain: one launch."""

import triton
import triton.language as tl
from torch import Tensor

from ..backend import device_of
from ..score.runs_kernel import slot_of

TILE, WARPS = 512, 4
VARYING = ["heads", "runs", "steps", "chosen", "width", "capacity"]


@triton.jit(do_not_specialize=VARYING)
def slots_kernel(
    index, count, begins, firsts, recents, lengths, starts, ends, scores, slots, number,
    heads, runs, steps, chosen, width, capacity,
    SHARING: tl.constexpr, ENDS_SHARING: tl.constexpr, QUERIES: tl.constexpr, RUNS: tl.constexpr,
    MARKS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program: TILE slots of one unit that has an index of its own, SHARING of which are one (row, KV head)."""
    unit = tl.program_id(0)
    pair = unit // SHARING
    row = pair // heads
    begin, first = tl.load(begins + row), tl.load(firsts + row)
    recent, length = tl.load(recents + row), tl.load(lengths + row)
    always = first + length - recent
    wanted = tl.minimum(tl.maximum(tl.load(count + unit), 0), chosen)
    place = tl.program_id(1) * TILE + tl.arange(0, TILE)
    is_chosen = (place >= always) & (place < always + wanted)
    candidate = tl.load(index + unit.to(tl.int64) * chosen + place - always, mask=is_chosen, other=0)
    if RUNS:
        starts += pair.to(tl.int64) * runs
        ends += (unit // ENDS_SHARING).to(tl.int64) * runs
        slot = slot_of(candidate, starts, ends, runs, steps, begin)
    else:
        slot = begin + candidate
    slot = tl.where(is_chosen, slot, tl.where(place < first, place, recent + place - first))
    slot = tl.where(place < always + wanted, slot, 0)
    tl.store(slots + unit.to(tl.int64) * width + place, slot, mask=place < width)
    if tl.program_id(1) == 0:
        tl.store(number + unit, always + wanted)
    if MARKS:
        gone = tl.full([TILE], float("-inf"), scores.dtype.element_ty)
        scores += unit.to(tl.int64) * QUERIES * capacity
        for query in range(QUERIES):
            tl.store(scores + query * capacity.to(tl.int64) + candidate, gone, mask=is_chosen)


def chosen_slots(
    index: Tensor,
    count: Tensor,
    begin: Tensor,
    first: Tensor,
    recent: Tensor,
    length: Tensor,
    starts: Tensor | None,
    ends: Tensor | None,
    scores: Tensor | None,
    slots: Tensor,
    number: Tensor,
) -> None:
    """Writes `slots` and `number`, and into `scores`, already checked."""
    units, pairs = count.numel(), count.shape[0] * count.shape[1]
    runs = 0 if ends is None else ends.shape[-1]
    ends_units = units if ends is None else ends.shape[:-1].numel()
    queries = 1 if scores is None else scores.shape[:3].numel() // units
    with device_of(index):
        slots_kernel[(units, triton.cdiv(slots.shape[-1], TILE))](
            index, count, begin, first, recent, length, starts, ends, scores, slots, number,
            count.shape[1], runs, runs.bit_length(), index.shape[-1], slots.shape[-1],
            1 if scores is None else scores.shape[-1],
            SHARING=units // pairs, ENDS_SHARING=units // ends_units, QUERIES=queries, RUNS=ends is not None,
            MARKS=scores is not None, TILE=TILE, num_warps=WARPS,
        )  # fmt: skip
