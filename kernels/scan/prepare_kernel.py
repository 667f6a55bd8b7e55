"""The first launch: what a head's programs share. One program per sequence and KV head takes its queries into the bases
of codes and of rows, scores the sample, and finds the threshold in it."""

import math

import triton
import triton.language as tl

from ..select.tile import kth_largest, ordered
from . import operands
from .tile import NONE, REDUCED, estimate, slots_of

LOWEST = tl.constexpr(-(1 << 31))
"""In the order of scores below all of them."""
OUTWEIGHS = tl.constexpr(operands.OUTWEIGHS)
OUTWEIGHING = tl.constexpr(math.log2(operands.OUTWEIGHS))
"""The same of a logit. Thresholds are no higher: what outweighs the sample is read whatever its rank."""
MARGIN = tl.constexpr(2.0**-18)
"""By which share of itself, a logit by so much more, a threshold is lowered: the same score is reckoned again for a
tile of another shape, and may then be rounded otherwise."""
LEAST_SCORE = tl.constexpr(2.0**-120)
"""The least score of a group's token that is read: smaller ones are not told from nothing."""


@triton.jit(do_not_specialize=["pages", "of_sequence", "of_head"])
def prepare_kernel(
    query_ptr, query_map_ptr, words_ptr, turn_ptr, reduced_ptr, scale_ptr, word_ptr, table_ptr,
    lengths_ptr, first_ptr, begin_ptr, stride_ptr, rank_ptr,
    projected_ptr, sums_ptr, by_word_ptr, turned_ptr, sample_ptr, base_ptr, threshold_ptr, arrivals_ptr, out_ptr,
    factor, cap, offset, pages: tl.int32, of_sequence: tl.int64, of_head: tl.int64,
    OF_TOKEN: tl.constexpr, PAGED: tl.constexpr, PAGE: tl.constexpr,
    GROUP: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr, D_TILE: tl.constexpr,
    RANK_TILE: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr, WIDTH_TILE: tl.constexpr, PITCH: tl.constexpr,
    WORDS: tl.constexpr, WORDS_TILE: tl.constexpr, CODED: tl.constexpr,
    SELECT: tl.constexpr, CAPPED: tl.constexpr, DV: tl.constexpr, SAMPLE: tl.constexpr, TILE: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    head, sequence = tl.program_id(0), tl.program_id(1)
    unit = (sequence * tl.num_programs(0) + head).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    queries_ptr = query_ptr + unit * (GROUP * D)
    place = tl.arange(0, RANK_TILE)
    query_map_ptr += head * (D * RANK_TILE) + place[:, None]
    every = (place < RANK_TILE)[:, None]
    found = products(query_map_ptr, RANK_TILE, every, queries_ptr, RANK_TILE, GROUP, COLUMNS, D, DTYPE)
    projected = (found * factor).to(DTYPE)
    sums = tl.sum(projected.to(tl.float32), 0) * offset
    projected_ptr += unit * (RANK_TILE * COLUMNS)
    tl.store(projected_ptr + place[:, None] * COLUMNS + column[None, :], projected)
    tl.store(sums_ptr + unit * COLUMNS + column, sums)
    by_word_ptr += unit * (WORDS_TILE * COLUMNS)
    if BITS != REDUCED:
        word = tl.arange(0, WORDS_TILE)
        words_ptr += head * (WORDS * D)
        by_word = products(
            words_ptr + word[:, None] * D, 1, (word < WORDS)[:, None], queries_ptr, WORDS_TILE, GROUP, COLUMNS, D, DTYPE
        )
        tl.store(by_word_ptr + word[:, None] * COLUMNS + column[None, :], by_word * factor)
    if CODED:
        dim = tl.arange(0, D_TILE)
        inside = (dim < D)[:, None]
        turned = products(turn_ptr + dim[:, None] * D, 1, inside, queries_ptr, D_TILE, GROUP, COLUMNS, D, tl.float32)
        turned_ptr += unit * (GROUP * D)
        to = turned_ptr + column[None, :] * D + dim[:, None]
        tl.store(to, turned.to(DTYPE), mask=inside & (column < GROUP)[None, :])
    tl.debug_barrier()  # what follows reads the logits of codewords

    first, stride = tl.load(first_ptr + sequence).to(tl.int32), tl.load(stride_ptr + sequence).to(tl.int32)
    rank, begin = tl.load(rank_ptr + sequence).to(tl.int32), tl.load(begin_ptr + sequence).to(tl.int32)
    start = tl.cdiv(first, stride) * stride
    count = tl.minimum(tl.maximum(tl.cdiv(begin - start, stride), 0), SAMPLE)
    best = tl.full([COLUMNS], NONE, tl.float32)
    mass = tl.zeros([COLUMNS], tl.float32)
    sample_ptr += unit * (GROUP * SAMPLE)
    for at in tl.range(0, count, TILE, num_stages=3):
        number = at + tl.arange(0, TILE)
        valid = number < count
        slot, in_page = slots_of(
            start + number * stride, valid, table_ptr, sequence, head, pages, of_sequence, of_head, OF_TOKEN, PAGED,
            PAGE,
        )  # fmt: skip
        logits, _ = estimate(
            reduced_ptr, scale_ptr, word_ptr, slot, in_page, valid, projected, sums, by_word_ptr, cap,
            BITS, WIDTH, WIDTH_TILE, PITCH, PAGED, COLUMNS, DTYPE, CAPPED,
        )  # fmt: skip
        logits = tl.where(valid[:, None], logits, NONE)
        risen = tl.maximum(best, tl.max(logits, 0))
        mass = mass * tl.exp2(best - risen) + tl.sum(tl.exp2(logits - risen[None, :]), 0)
        best = risen
        held = valid[:, None] & (column < GROUP)[None, :]
        tl.store(sample_ptr + column[None, :] * SAMPLE + number[:, None], logits, mask=held)
    base = tl.where(mass > 0, best + tl.log2(tl.where(mass > 0, mass, 1.0)), 0.0)
    # Columns that no query has weigh nothing.
    tl.store(base_ptr + unit * COLUMNS + column, tl.where(column < GROUP, base, float("inf")))
    tl.debug_barrier()  # what follows reads the sample

    place_in_sample = tl.arange(0, SAMPLE)
    inside = place_in_sample < count
    threshold_ptr += unit * COLUMNS
    scores = tl.full([SAMPLE], 0.0 if SELECT == "group" else NONE, tl.float32)
    for query in tl.static_range(GROUP):
        logits = tl.load(sample_ptr + query * SAMPLE + place_in_sample, mask=inside, other=NONE)
        own_base = tl.sum(tl.where(column == query, base, 0.0), 0)
        if SELECT == "group":
            scores += tl.exp2(logits - own_base)
        elif SELECT == "max":
            scores = tl.maximum(scores, logits)
        else:
            own = tl.minimum(threshold_of(logits, inside, rank, count, MARGIN), own_base + OUTWEIGHING)
            tl.store(threshold_ptr + query, own)
    if SELECT == "head":
        tl.store(threshold_ptr + column, tl.full([COLUMNS], float("inf"), tl.float32), mask=column >= GROUP)
    else:
        threshold = threshold_of(scores, inside, rank, count, 0.0 if SELECT == "group" else MARGIN)
        if SELECT == "group":
            threshold = tl.where(threshold == NONE, NONE, tl.maximum(threshold, LEAST_SCORE))
            thresholds = tl.zeros([COLUMNS], tl.float32) + tl.minimum(threshold, OUTWEIGHS)
        else:
            thresholds = tl.where(column < GROUP, tl.minimum(threshold, base + OUTWEIGHING), float("inf"))
        tl.store(threshold_ptr + column, thresholds)
    tl.store(arrivals_ptr + unit, 0)
    if tl.load(lengths_ptr + sequence) <= 0:  # no range will be of this sequence
        for at in range(0, GROUP * DV, 256):
            of_out = at + tl.arange(0, 256)
            nothing = tl.zeros([256], out_ptr.dtype.element_ty)
            tl.store(out_ptr + unit * (GROUP * DV) + of_out, nothing, mask=of_out < GROUP * DV)


@triton.jit
def products(
    matrix_ptr, step: tl.constexpr, inside, queries_ptr, ROWS: tl.constexpr, GROUP: tl.constexpr,
    COLUMNS: tl.constexpr, D: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """[ROWS, COLUMNS] float32: a matrix, whose rows begin at `matrix_ptr` [ROWS, 1], times queries [GROUP, D].

    Few dimensions at a time, so that a large matrix needs few registers.
    """
    column = tl.arange(0, COLUMNS)
    found = tl.zeros([ROWS, COLUMNS], tl.float32)
    for at in range(0, D, 16):
        dim = at + tl.arange(0, 16)
        part = tl.load(matrix_ptr + dim[None, :] * step, mask=inside & (dim < D)[None, :], other=0.0).to(DTYPE)
        held = (dim < D)[:, None] & (column < GROUP)[None, :]
        queries = tl.load(queries_ptr + column[None, :] * D + dim[:, None], mask=held, other=0.0).to(DTYPE)
        found = tl.dot(part, queries, found, input_precision="tf32x3")
    return found


@triton.jit
def threshold_of(scores, inside, rank, count, margin):
    """The rank-th largest score of the sample, which has `count`; infinity where no candidate is read, -infinity where
    all are."""
    threshold = tl.where(rank == 0, float("inf"), NONE)
    if (rank > 0) & (rank <= count):
        order = tl.where(inside, ordered(scores), LOWEST)
        bound = kth_largest(order, LOWEST + 1, rank, 0)
        least = tl.min(tl.where(order >= bound, order, 0x7FFFFFFF), 0)
        threshold = tl.where(least >= 0, least, LOWEST - least).to(tl.float32, bitcast=True)
        threshold -= tl.abs(threshold) * MARGIN + margin
    return threshold
