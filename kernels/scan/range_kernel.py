"""The second launch: each program takes a range of a head's tokens, and the last to finish joins what all have found.

Of every tile of its range a program estimates the logits, lists the tokens that are read, and adds up the weights of
the others by codeword and by page. Then it attends to the listed tokens, multiplies the sums with what they stand for,
and leaves one partial result.
"""

import triton
import triton.language as tl

from ..attend.split import part_of_program, parts_of_unit
from ..codes import OFFSET
from .digits import digit_at, one_hot, spread
from .parts import QUERIES, join, leave_part
from .tile import NONE, capped, estimate, numbers_to, slots_of

CODE_OFFSET = tl.constexpr(OFFSET[8])
VARYING = [
    "longest", "sequences", "splits", "capacity", "pages", "of_sequence", "of_head", "corrections",
    "correction_sequence", "correction_head",
]  # fmt: skip
"""What grows with the capacity of a cache, and must not compile the kernel again."""


@triton.jit(do_not_specialize=VARYING)
def range_kernel(
    query_ptr, key_ptr, value_ptr, reduced_ptr, scale_ptr, word_ptr, key_scale_ptr, value_scale_ptr,
    correction_ptr, correction_scale_ptr, table_ptr, values_ptr, turn_ptr,
    lengths_ptr, first_ptr, begin_ptr, sink_logits_ptr,
    projected_ptr, sums_ptr, by_word_ptr, base_ptr, threshold_ptr, arrivals_ptr,
    list_ptr, marks_ptr, page_ptr, other_ptr, word_sum_ptr, part_ptr, turned_part_ptr, lse_ptr, read_ptr, out_ptr,
    factor, cap, longest, sequences, splits, capacity, pages: tl.int32, of_sequence: tl.int64, of_head: tl.int64,
    corrections: tl.int32, correction_sequence: tl.int64, correction_head: tl.int64,
    OF_TOKEN: tl.constexpr, OF_PAGE: tl.constexpr, PAGED: tl.constexpr, PAGE: tl.constexpr, KEY_PITCH: tl.constexpr,
    VALUE_PITCH: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr, D_TILE: tl.constexpr,
    DV: tl.constexpr, DV_TILE: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr, WIDTH_TILE: tl.constexpr,
    PITCH: tl.constexpr, RANK_TILE: tl.constexpr, WORDS: tl.constexpr, WORDS_TILE: tl.constexpr, LOW: tl.constexpr,
    CODED: tl.constexpr, RESIDUAL: tl.constexpr, CORRECTED: tl.constexpr, SELECT: tl.constexpr, CAPPED: tl.constexpr,
    SINK_LOGITS: tl.constexpr, MARKED: tl.constexpr, UNITS: tl.constexpr, TILE: tl.constexpr, GATHERED: tl.constexpr,
    PARTS: tl.constexpr, STAGES: tl.constexpr, DTYPE: tl.constexpr, WEIGHT: tl.constexpr,
):  # fmt: skip
    """Scratch, of a head: list, marks [capacity] int32; page [capacity / PAGE, COLUMNS] float32, each range its part;
    of a program: other [COLUMNS], word_sum [WORDS_TILE, COLUMNS] float32. Partial results: part, turned_part
    [GROUP, DV], lse [GROUP] (base 2)."""
    part, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    sequence, start, end = part_of_program(lengths_ptr, part, sequences, longest, splits, UNITS, TILE)
    if sequence >= sequences:
        return
    sequence, start, end = sequence.to(tl.int32), start.to(tl.int32), end.to(tl.int32)
    unit = (sequence * heads + head).to(tl.int64)
    slot_of_program = (head * tl.num_programs(0) + part).to(tl.int64)
    length = tl.minimum(tl.load(lengths_ptr + sequence), longest).to(tl.int32)
    column = tl.arange(0, COLUMNS)
    list_ptr += unit * capacity + start
    marks_ptr += unit * capacity + start
    page_ptr += (unit * capacity + start) // PAGE * COLUMNS
    other_ptr += slot_of_program * COLUMNS
    word_sum_ptr += slot_of_program * (WORDS_TILE * COLUMNS)
    by_word_ptr += unit * (WORDS_TILE * COLUMNS)
    base = tl.load(base_ptr + unit * COLUMNS + column)
    threshold = tl.load(threshold_ptr + unit * COLUMNS + column)
    threshold_of_group = tl.load(threshold_ptr + unit * COLUMNS)
    first, begin = tl.load(first_ptr + sequence).to(tl.int32), tl.load(begin_ptr + sequence).to(tl.int32)
    place = tl.arange(0, RANK_TILE)
    projected = tl.load(projected_ptr + unit * (RANK_TILE * COLUMNS) + place[:, None] * COLUMNS + column[None, :])
    sums = tl.load(sums_ptr + unit * COLUMNS + column)

    HIGH: tl.constexpr = WORDS_TILE // LOW
    other = tl.zeros([TILE, COLUMNS], tl.float32)
    word_sums = tl.zeros([HIGH * COLUMNS, LOW], tl.float32)
    listed = 0
    for at in tl.range(start, end, TILE, num_stages=STAGES):
        token = at + tl.arange(0, TILE)
        valid = token < end
        slot, in_page = slots_of(
            token, valid, table_ptr, sequence, head, pages, of_sequence, of_head, OF_TOKEN, PAGED, PAGE
        )  # fmt: skip
        logits, word = estimate(
            reduced_ptr, scale_ptr, word_ptr, slot, in_page, valid, projected, sums, by_word_ptr, cap,
            BITS, WIDTH, WIDTH_TILE, PITCH, PAGED, COLUMNS, DTYPE, CAPPED,
        )  # fmt: skip
        weights = tl.exp2(logits - base[None, :])
        always = (token < first) | (token >= begin)
        if SELECT == "group":
            read = (tl.sum(weights, 1) >= threshold_of_group) | always
        else:
            reads = (logits >= threshold[None, :]) | (always[:, None] & (column < GROUP)[None, :])
            read = tl.max(reads.to(tl.int32), 1) > 0
        read = read & valid
        count = tl.cumsum(read.to(tl.int32), 0)
        tl.store(list_ptr + listed + count - 1, token, mask=read)
        if SELECT == "head":
            mark = tl.sum(tl.where(reads, 1 << column[None, :], 0), 1)
            tl.store(marks_ptr + listed + count - 1, mark, mask=read)
        listed += tl.sum(read.to(tl.int32), 0)
        if MARKED:
            if SELECT == "head":
                to = read_ptr + (unit * GROUP + column)[None, :] * longest + token[:, None]
                tl.store(to, reads.to(tl.uint8), mask=(column < GROUP)[None, :] & valid[:, None])
            else:
                tl.store(read_ptr + unit * longest + token, read.to(tl.uint8), mask=valid)
        if RESIDUAL:
            if SELECT == "head":
                weights = tl.where(reads | ~valid[:, None], 0.0, weights)
            else:
                weights = tl.where((read | ~valid)[:, None], 0.0, weights)
            other += weights
            word_sums = tl.dot(
                tl.trans(spread(weights, word // LOW, HIGH, WEIGHT)), one_hot(word % LOW, LOW, WEIGHT), word_sums,
                input_precision="tf32x3",
            )  # fmt: skip
            if CORRECTED:
                of_pages = tl.sum(tl.reshape(weights, [TILE // PAGE, PAGE, COLUMNS]), 1)
                page = (at - start) // PAGE + tl.arange(0, TILE // PAGE)
                tl.store(page_ptr + page[:, None] * COLUMNS + column[None, :], of_pages)
    if RESIDUAL:
        tl.store(other_ptr + column, tl.sum(other, 0))
        row, low = tl.arange(0, HIGH * COLUMNS), tl.arange(0, LOW)
        of_word = (digit_at(row % HIGH, HIGH) * LOW)[:, None] + digit_at(low, LOW)[None, :]
        tl.store(word_sum_ptr + of_word * COLUMNS + (row // HIGH)[:, None], word_sums)
    tl.debug_barrier()  # what follows reads the list and the sums

    best, mass, total, total_turned = attend_listed(
        query_ptr + unit * (GROUP * D), key_ptr, value_ptr, key_scale_ptr, value_scale_ptr, word_ptr,
        by_word_ptr, values_ptr + head * (WORDS * DV), list_ptr, marks_ptr, listed,
        table_ptr, sequence, head, pages, of_sequence, of_head, factor, cap,
        OF_TOKEN, PAGED, PAGE, KEY_PITCH, VALUE_PITCH, GROUP, COLUMNS, D, D_TILE, DV, DV_TILE, CODED, SELECT, CAPPED,
        GATHERED, DTYPE, WEIGHT,
    )  # fmt: skip
    if RESIDUAL:
        others = stand_ins(
            values_ptr + head * (WORDS * DV), word_sum_ptr, page_ptr, correction_ptr, correction_scale_ptr,
            start // PAGE, tl.minimum(tl.cdiv(end, PAGE), length // PAGE), table_ptr, sequence, head, pages,
            corrections, correction_sequence, correction_head,
            OF_PAGE, PAGED, COLUMNS, DV, DV_TILE, WORDS, WORDS_TILE, CORRECTED, WEIGHT,
        )  # fmt: skip
        query = tl.arange(0, QUERIES)
        other_mass = tl.load(other_ptr + query, mask=query < COLUMNS, other=0.0)
        other_base = tl.load(base_ptr + unit * COLUMNS + query, mask=query < COLUMNS, other=0.0)
        most_logit = tl.maximum(best, tl.where(other_mass > 0, other_base, NONE))
        shift = tl.where(most_logit == NONE, 0.0, most_logit)
        exact, estimated = tl.exp2(best - shift), tl.where(other_mass > 0, tl.exp2(other_base - shift), 0.0)
        best, mass = most_logit, mass * exact + other_mass * estimated
        total = total * exact[:, None] + others * estimated[:, None]
        total_turned = total_turned * exact[:, None]
    leave_part(part_ptr, turned_part_ptr, lse_ptr, slot_of_program, best, mass, total, total_turned, GROUP, DV, DV_TILE,
               CODED)  # fmt: skip

    tl.debug_barrier()  # every thread has left its share before the program says so
    before, parts = parts_of_unit(lengths_ptr, sequence, sequences, longest, splits, UNITS, TILE)
    if tl.atomic_add(arrivals_ptr + unit, 1, sem="acq_rel") == parts - 1:
        join(
            part_ptr, turned_part_ptr, lse_ptr, (head * tl.num_programs(0) + before).to(tl.int64), parts,
            sink_logits_ptr + head * GROUP, turn_ptr, out_ptr + unit * (GROUP * DV),
            GROUP, DV, DV_TILE, CODED, SINK_LOGITS, PARTS,
        )  # fmt: skip


@triton.jit
def attend_listed(
    query_ptr, key_ptr, value_ptr, key_scale_ptr, value_scale_ptr, word_ptr, by_word_ptr, values_ptr,
    list_ptr, marks_ptr, listed, table_ptr, sequence, head, pages, of_sequence, of_head, factor, cap,
    OF_TOKEN: tl.constexpr, PAGED: tl.constexpr, PAGE: tl.constexpr, KEY_PITCH: tl.constexpr,
    VALUE_PITCH: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr,
    D: tl.constexpr, D_TILE: tl.constexpr, DV: tl.constexpr, DV_TILE: tl.constexpr, CODED: tl.constexpr,
    SELECT: tl.constexpr, CAPPED: tl.constexpr, GATHERED: tl.constexpr, DTYPE: tl.constexpr, WEIGHT: tl.constexpr,
):  # fmt: skip
    """A running softmax over the listed tokens: (largest logit [QUERIES], mass, Σ weight · value [QUERIES, DV_TILE];
    and the same sum over values in 8 bits, which are rotated, where the first one is over their codewords' values)."""
    query = tl.arange(0, QUERIES)
    dim, value_dim = tl.arange(0, D_TILE), tl.arange(0, DV_TILE)
    held = (query < GROUP)[:, None] & (dim < D)[None, :]
    queries = tl.load(query_ptr + query[:, None] * D + dim[None, :], mask=held, other=0.0).to(DTYPE)
    best = tl.full([QUERIES], NONE, tl.float32)
    mass = tl.zeros([QUERIES], tl.float32)
    total = tl.zeros([QUERIES, DV_TILE], tl.float32)
    total_turned = total
    for at in range(0, listed, GATHERED):
        rank = at + tl.arange(0, GATHERED)
        valid = rank < listed
        token = tl.load(list_ptr + rank, mask=valid, other=0)
        slot, in_page = slots_of(
            token, valid, table_ptr, sequence, head, pages, of_sequence, of_head, OF_TOKEN, PAGED, PAGE
        )  # fmt: skip
        # All loads stand before the first use of any, so that all are under way at once.
        inside = valid[:, None] & (dim < D)[None, :]
        to = numbers_to(key_ptr, slot, in_page, KEY_PITCH, PAGED)
        keys = tl.load(key_ptr + to[:, None] + dim[None, :], mask=inside, other=0)
        inside = valid[:, None] & (value_dim < DV)[None, :]
        to = numbers_to(value_ptr, slot, in_page, VALUE_PITCH, PAGED)
        values = tl.load(value_ptr + to[:, None] + value_dim[None, :], mask=inside, other=0)
        if CODED:
            to = numbers_to(key_scale_ptr, slot, in_page, 1, PAGED)  # of all that are as wide
            key_scale = tl.load(key_scale_ptr + to, mask=valid, other=0.0).to(tl.float32)
            value_scale = tl.load(value_scale_ptr + to, mask=valid, other=0.0).to(tl.float32)
            to = numbers_to(word_ptr, slot, in_page, 1, PAGED)
            word = tl.load(word_ptr + to, mask=valid, other=0).to(tl.int32)
            stands = tl.load(values_ptr + word[:, None] * DV + value_dim[None, :], mask=inside, other=0.0).to(DTYPE)
            logits_of_word = tl.load(
                by_word_ptr + word[None, :] * COLUMNS + query[:, None], mask=(query < COLUMNS)[:, None], other=0.0
            )
            keys = tl.where((dim < D)[None, :], keys.to(tl.float32) - CODE_OFFSET, 0.0)
            values = tl.where((value_dim < DV)[None, :], values.to(tl.float32) - CODE_OFFSET, 0.0)
        logits = tl.dot(queries, tl.trans(keys.to(DTYPE)), input_precision="tf32x3") * factor
        if CODED:
            logits = logits * key_scale[None, :] + logits_of_word
        if CAPPED:
            logits = capped(logits, cap)
        present = valid[None, :] & (query < GROUP)[:, None]
        if SELECT == "head":
            mark = tl.load(marks_ptr + rank, mask=valid, other=0)
            present = present & (((mark[None, :] >> query[:, None]) & 1) == 1)
        logits = tl.where(present, logits, NONE)
        risen = tl.maximum(best, tl.max(logits, 1))
        shift = tl.where(risen == NONE, 0.0, risen)  # -inf - -inf is NaN
        weights = tl.exp2(logits - shift[:, None])
        fade = tl.exp2(best - shift)
        best, mass = risen, mass * fade + tl.sum(weights, 1)
        if CODED:
            total = tl.dot(weights.to(DTYPE), stands, total * fade[:, None], input_precision="tf32x3")
            weights = weights * value_scale[None, :]
            total_turned = tl.dot(
                weights.to(WEIGHT), values.to(WEIGHT), total_turned * fade[:, None], input_precision="tf32x3"
            )
        else:
            total = tl.dot(weights.to(DTYPE), values.to(DTYPE), total * fade[:, None], input_precision="tf32x3")
    return best, mass, total, total_turned


@triton.jit
def stand_ins(
    values_ptr, word_sum_ptr, page_ptr, correction_ptr, correction_scale_ptr, first_page, end_page,
    table_ptr, sequence, head, pages, corrections, correction_sequence, correction_head,
    OF_PAGE: tl.constexpr, PAGED: tl.constexpr, COLUMNS: tl.constexpr, DV: tl.constexpr, DV_TILE: tl.constexpr,
    WORDS: tl.constexpr, WORDS_TILE: tl.constexpr, CORRECTED: tl.constexpr, WEIGHT: tl.constexpr,
):  # fmt: skip
    """[QUERIES, DV_TILE]: codewords' values with the weights that were added up by codeword, and corrections of the
    full pages of this range, with those by page."""
    query, dim, number = tl.arange(0, QUERIES), tl.arange(0, DV_TILE), tl.arange(0, 16)
    total = tl.zeros([QUERIES, DV_TILE], tl.float32)
    for at in range(0, WORDS_TILE, 16):
        word = at + number
        weights = tl.load(
            word_sum_ptr + word[None, :] * COLUMNS + query[:, None], mask=(query < COLUMNS)[:, None], other=0.0
        )
        inside = (word < WORDS)[:, None] & (dim < DV)[None, :]
        values = tl.load(values_ptr + word[:, None] * DV + dim[None, :], mask=inside, other=0.0).to(WEIGHT)
        total = tl.dot(weights.to(WEIGHT), values, total, input_precision="tf32x3")
    if CORRECTED:
        for at in range(first_page, end_page, 16):
            page = at + number
            valid = page < end_page
            if PAGED:
                slot = tl.load(table_ptr + sequence * pages + page, mask=valid, other=0).to(tl.int64)
                slot = slot * correction_sequence + head * correction_head
            else:
                slot = sequence.to(tl.int64) * correction_sequence + head * correction_head
                slot = slot + page.to(tl.int64) * OF_PAGE
            valid = valid & (page < corrections)
            to = numbers_to(correction_ptr, slot, 0, DV, PAGED)
            to_scale = numbers_to(correction_scale_ptr, slot, 0, 1, PAGED)
            held = valid[None, :] & (query < COLUMNS)[:, None]
            weights = tl.load(page_ptr + (page - first_page)[None, :] * COLUMNS + query[:, None], mask=held, other=0.0)
            scale = tl.load(correction_scale_ptr + to_scale, mask=valid, other=0.0).to(tl.float32)
            inside = valid[:, None] & (dim < DV)[None, :]
            code = tl.load(correction_ptr + to[:, None] + dim[None, :], mask=inside, other=0)
            code = tl.where(inside, code.to(tl.float32) - CODE_OFFSET, 0.0)
            total = tl.dot((weights * scale[None, :]).to(WEIGHT), code.to(WEIGHT), total, input_precision="tf32x3")
    return total
