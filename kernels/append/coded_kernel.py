"""One program per (sequence, KV head) stores a token with its codeword and codes, and the correction of a page that it
fills."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..backend import device_of
from ..codes import LARGEST_SCALE, OFFSET, STEP, Calibrated
from ..pages import PAGE
from ..pages.table import capacity_of
from ..scan.operands import Place, Tokens
from ..scan.tile import numbers_to

STEP_2, STEP_4 = tl.constexpr(STEP[2]), tl.constexpr(STEP[4])
LARGEST = tl.constexpr(LARGEST_SCALE)
OFFSET_8 = tl.constexpr(OFFSET[8])
DIMS = tl.constexpr(16)
"""Dimensions that are multiplied at a time."""
WARPS = 8
VARYING = ["capacity", "pages", "of_sequence", "of_head", "correction_sequence", "correction_head"]
"""What grows with the capacity of a cache, and must not compile the kernel again."""


@triton.jit(do_not_specialize=VARYING)
def append_coded_kernel(
    key_new, value_new, words_key, words_value, half, inverse, key_map, turn_key, turn_value,
    key, value, code, scale, word_ptr, key_scale, value_scale, correction, correction_scale, table, lengths,
    capacity: tl.int64, pages: tl.int32, of_sequence: tl.int64, of_head: tl.int64,
    correction_sequence: tl.int64, correction_head: tl.int64,
    key_new_sequence: tl.int64, key_new_head: tl.int64, value_new_sequence: tl.int64, value_new_head: tl.int64,
    OF_TOKEN: tl.constexpr, OF_PAGE: tl.constexpr, PAGED: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr,
    D_TILE: tl.constexpr, DV: tl.constexpr, DV_TILE: tl.constexpr, RANK: tl.constexpr, BITS: tl.constexpr,
    BYTES_TILE: tl.constexpr, WORDS: tl.constexpr, WORDS_TILE: tl.constexpr, CODED: tl.constexpr,
    CORRECTED: tl.constexpr, CODE_PITCH: tl.constexpr, KEY_PITCH: tl.constexpr, VALUE_PITCH: tl.constexpr,
):  # fmt: skip
    head, sequence = tl.program_id(0), tl.program_id(1)
    token = tl.load(lengths + sequence).to(tl.int64)
    if (token < 0) | (token >= capacity):
        return
    if PAGED:
        page, place = tl.load(table + sequence * pages + token // PAGE).to(tl.int64), token % PAGE
        slot = page * of_sequence + head * of_head
    else:
        page, place = sequence.to(tl.int64), token
        slot = page * of_sequence + head * of_head + token * OF_TOKEN
    key_new += sequence * key_new_sequence + head * key_new_head
    value_new += sequence * value_new_sequence + head * value_new_head
    words_key += head * (WORDS * D)
    words_value += head * (WORDS * DV)
    word = nearest(
        key_new, value_new, words_key, words_value, half + head * WORDS, inverse + head * 2, D, DV, WORDS, WORDS_TILE
    )
    tl.store(word_ptr + numbers_to(word_ptr, slot, place, 1, PAGED), word.to(tl.uint8))

    FIELDS: tl.constexpr = 8 // BITS
    BYTES: tl.constexpr = RANK // FIELDS
    byte, field = tl.arange(0, BYTES_TILE), tl.arange(0, FIELDS)
    column = byte[:, None] + field[None, :] * BYTES
    inside = (byte < BYTES)[:, None] & (field < FIELDS)[None, :]
    found = tl.zeros([BYTES_TILE, FIELDS], tl.float32)
    for at in range(0, D, DIMS):
        dim = at + tl.arange(0, DIMS)
        rest = difference(key_new, words_key + word * D, dim, D)
        to = key_map + head * (D * RANK) + dim[:, None, None] * RANK + column[None, :, :]
        held = (dim < D)[:, None, None] & inside[None, :, :]
        found += tl.sum(tl.load(to, mask=held, other=0.0) * rest[:, None, None], 0)
    number, own_scale = encoded(found, RANK, BITS)
    packed = tl.sum(tl.where(inside, number << (field * BITS)[None, :], 0), 1)
    to_code = code + numbers_to(code, slot, place, CODE_PITCH, PAGED)
    tl.store(to_code + byte, packed.to(tl.uint8), mask=byte < BYTES)
    tl.store(scale + numbers_to(scale, slot, place, 1, PAGED), own_scale.to(tl.float16))

    key += numbers_to(key, slot, place, KEY_PITCH, PAGED)
    to_value = value + numbers_to(value, slot, place, VALUE_PITCH, PAGED)
    if CODED:
        to_scale = numbers_to(key_scale, slot, place, 1, PAGED)  # of both
        put_row(key_new, words_key + word * D, turn_key, key, key_scale + to_scale, D, D_TILE)
        put_row(value_new, words_value + word * DV, turn_value, to_value, value_scale + to_scale, DV, DV_TILE)
    else:
        dim, value_dim = tl.arange(0, D_TILE), tl.arange(0, DV_TILE)
        numbers = tl.load(key_new + dim, mask=dim < D)
        tl.store(key + dim, numbers.to(tl.float32).to(key.dtype.element_ty), mask=dim < D)
        numbers = tl.load(value_new + value_dim, mask=value_dim < DV)
        tl.store(to_value + value_dim, numbers.to(tl.float32).to(value.dtype.element_ty), mask=value_dim < DV)

    if CORRECTED:  # noqa: SIM102 (this one is the compiler's)
        if (token + 1) % PAGE == 0:
            tl.debug_barrier()  # the page holds this token now
            back = PAGE - 1 - tl.arange(0, PAGE)
            if PAGED:
                slots, places = slot, place - back
                of_page = page * correction_sequence + head * correction_head
            else:
                slots, places = slot - back * OF_TOKEN, place
                of_page = page * correction_sequence + head * correction_head + token // PAGE * OF_PAGE
            put_correction(
                value, value_scale, word_ptr, words_value, turn_value,
                numbers_to(value, slots, places, VALUE_PITCH, PAGED),
                numbers_to(value_scale, slots, places, 1, PAGED), numbers_to(word_ptr, slots, places, 1, PAGED),
                correction + numbers_to(correction, of_page, 0, DV, PAGED),
                correction_scale + numbers_to(correction_scale, of_page, 0, 1, PAGED), DV, DV_TILE, PAGE, CODED,
            )  # fmt: skip


@triton.jit
def nearest(
    key_new, value_new, words_key, words_value, half, inverse, D: tl.constexpr, DV: tl.constexpr, WORDS: tl.constexpr,
    WORDS_TILE: tl.constexpr,
):  # fmt: skip
    """The codeword of the least ½|c|² − x·c, with keys and values divided by their spread."""
    word = tl.arange(0, WORDS_TILE)
    score = tl.load(half + word, mask=word < WORDS, other=float("inf"))
    score -= dots(key_new, words_key, tl.load(inverse), D, WORDS, WORDS_TILE)
    score -= dots(value_new, words_value, tl.load(inverse + 1), DV, WORDS, WORDS_TILE)
    return tl.argmin(score, 0)


@triton.jit
def dots(vector, words, factor, WIDTH: tl.constexpr, WORDS: tl.constexpr, WORDS_TILE: tl.constexpr):
    """[WORDS_TILE]: a vector's products with all codewords, times a factor."""
    word = tl.arange(0, WORDS_TILE)
    found = tl.zeros([WORDS_TILE], tl.float32)
    for at in range(0, WIDTH, DIMS):
        dim = at + tl.arange(0, DIMS)
        numbers = tl.load(vector + dim, mask=dim < WIDTH, other=0.0).to(tl.float32) * factor
        inside = (word < WORDS)[:, None] & (dim < WIDTH)[None, :]
        tile = tl.load(words + word[:, None] * WIDTH + dim[None, :], mask=inside, other=0.0)
        found += tl.sum(tile * numbers[None, :], 1)
    return found


@triton.jit
def difference(vector, codeword, dim, WIDTH: tl.constexpr):
    numbers = tl.load(vector + dim, mask=dim < WIDTH, other=0.0).to(tl.float32)
    return numbers - tl.load(codeword + dim, mask=dim < WIDTH, other=0.0)


@triton.jit
def encoded(numbers, COUNT: tl.constexpr, BITS: tl.constexpr):
    """(whole numbers from 0, scale) as `codes.encode` has them, of COUNT numbers; beyond these `numbers` are 0."""
    HALF: tl.constexpr = 1 << (BITS - 1)
    square = tl.sum(numbers * numbers)
    step = tl.div_rn(tl.max(tl.abs(numbers)), HALF - 0.5)
    if BITS == 2:
        step = tl.minimum(step, tl.sqrt_rn(tl.div_rn(square, COUNT * 1.0)) * STEP_2)
    elif BITS == 4:
        step = tl.minimum(step, tl.sqrt_rn(tl.div_rn(square, COUNT * 1.0)) * STEP_4)
    level = tl.floor(tl.div_rn(numbers, tl.where(step > 0, step, float("inf")) + tl.zeros_like(numbers)))
    level = tl.minimum(tl.maximum(level, -HALF), HALF - 1)
    along = tl.sum(numbers * (level + 0.5))
    scale = tl.minimum(tl.div_rn(square, tl.where(square > 0, along, 1.0)), LARGEST)
    return (level + HALF).to(tl.int32), scale


@triton.jit
def put_row(vector, codeword, turn, row, row_scale, WIDTH: tl.constexpr, WIDTH_TILE: tl.constexpr):
    """A key or value in 8 bits: what its codeword leaves, rotated."""
    place = tl.arange(0, WIDTH_TILE)
    found = tl.zeros([WIDTH_TILE], tl.float32)
    for at in range(0, WIDTH, DIMS):
        dim = at + tl.arange(0, DIMS)
        inside = (place < WIDTH)[:, None] & (dim < WIDTH)[None, :]
        tile = tl.load(turn + place[:, None] * WIDTH + dim[None, :], mask=inside, other=0.0)
        found += tl.sum(tile * difference(vector, codeword, dim, WIDTH)[None, :], 1)
    number, scale = encoded(found, WIDTH, 8)
    tl.store(row + place, number.to(tl.uint8), mask=place < WIDTH)
    tl.store(row_scale, scale.to(tl.float16))


@triton.jit
def put_correction(
    value, value_scale, word_ptr, words_value, turn, to_values, to_scales, to_words, correction, correction_scale,
    DV: tl.constexpr, DV_TILE: tl.constexpr, PAGE: tl.constexpr, CODED: tl.constexpr,
):  # fmt: skip
    """The mean over a page of what codewords leave of values, in 8 bits.

    Args:
        to_values, to_scales, to_words: [PAGE] int64, where what is kept of its tokens begins.
    """
    place = tl.arange(0, DV_TILE)
    mean = tl.zeros([DV_TILE], tl.float32)
    if CODED:
        scale = tl.load(value_scale + to_scales).to(tl.float32)
        for at in range(0, DV, DIMS):
            dim = at + tl.arange(0, DIMS)
            number = tl.load(value + to_values[:, None] + dim[None, :], mask=(dim < DV)[None, :], other=0)
            rotated = tl.sum((number.to(tl.float32) - OFFSET_8) * scale[:, None], 0) / PAGE
            inside = (dim < DV)[:, None] & (place < DV)[None, :]
            tile = tl.load(turn + dim[:, None] * DV + place[None, :], mask=inside, other=0.0)
            mean += tl.sum(tile * rotated[:, None], 0)
    else:
        word = tl.load(word_ptr + to_words).to(tl.int32)
        inside = (place < DV)[None, :]
        numbers = tl.load(value + to_values[:, None] + place[None, :], mask=inside, other=0.0).to(tl.float32)
        stands = tl.load(words_value + word[:, None] * DV + place[None, :], mask=inside, other=0.0)
        mean += tl.sum(numbers - stands, 0) / PAGE
    number, mean_scale = encoded(mean, DV, 8)
    tl.store(correction + place, number.to(tl.uint8), mask=place < DV)
    tl.store(correction_scale, mean_scale.to(tl.float16))


def append_coded(
    key_new: Tensor, value_new: Tensor, tokens: Tokens, tables: Calibrated, lengths: Tensor, bits: int,
    table: Tensor | None,
) -> None:  # fmt: skip
    """See `kvcal.kernels.append.append_coded`; the operands are checked."""
    batch, heads, width = key_new.shape
    values, (_, words, _), rank = value_new.shape[-1], tables["key"].shape, tables["key_map"].shape[-1]
    none = key_new  # in place of what the kernel does not touch
    held = {name: none if part is None else part for name, part in vars(tokens).items()}
    coded, corrected = tokens.key_scale is not None, tokens.correction is not None
    parts, pages = (tokens.reduced, tokens.key, tokens.value), 0
    if table is None:
        place, of_table, pitches = Place.of(tokens.key), none, [part.shape[3] for part in parts]
        of_pages = Place(0, 0, 1) if tokens.correction is None else Place.of(tokens.correction)
    else:
        assert tokens.pieces is not None
        place = of_pages = Place(*tokens.pieces, 1)
        of_table, pages, pitches = table, table.stride(0), [part.stride(2) for part in parts]
    with device_of(key_new):
        append_coded_kernel[(heads, batch)](
            key_new, value_new, *(tables[name] for name in ("key", "value", "half", "inverse", "key_map")),
            tables["turn_key"], tables["turn_value"], tokens.key, tokens.value, tokens.reduced, held["scale"],
            held["codeword"], held["key_scale"], held["value_scale"], held["correction"], held["correction_scale"],
            of_table, lengths, capacity_of(tokens.key, table), pages,
            place.sequence, place.head, of_pages.sequence, of_pages.head, *key_new.stride()[:2],
            *value_new.stride()[:2],
            OF_TOKEN=place.token, OF_PAGE=of_pages.token, PAGED=table is not None, PAGE=PAGE,
            D=width, D_TILE=triton.next_power_of_2(width), DV=values, DV_TILE=triton.next_power_of_2(values),
            RANK=rank, BITS=bits, BYTES_TILE=triton.next_power_of_2(rank * bits // 8), WORDS=words,
            WORDS_TILE=triton.next_power_of_2(words), CODED=coded, CORRECTED=corrected,
            CODE_PITCH=pitches[0], KEY_PITCH=pitches[1], VALUE_PITCH=pitches[2], num_warps=WARPS,
        )  # fmt: skip
