"""Pieces of both kernels for a GPU: where tokens lie, and what they are estimated to score.

Logits are in units of log 2. COLUMNS is how many queries of a group a tile has, the group filled up.
"""

import triton
import triton.language as tl

from .. import pages

ALIGNED = tl.constexpr(pages.ALIGNED)
LOG2E = tl.constexpr(1.4426950408889634)
NONE = tl.constexpr(float("-inf"))
REDUCED = tl.constexpr(16)
"""In place of bits: tokens are scored by reduced keys."""


@triton.jit
def slots_of(
    token, valid, table_ptr, sequence, head, pages, of_sequence, of_head, of_token,
    PAGED: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """([TOKENS] int64, [TOKENS]): where tokens lie in every part, counted in tokens, and nothing that counts; with
    PAGED where the piece of page and head lies, in multiples of 64 bytes, and the token's place in the page.

    Args:
        of_sequence, of_head: what the first of these grows by from one sequence, or page, to the next, and from one
            head to the next.
    """
    if PAGED:
        page = tl.load(table_ptr + sequence * pages + token // PAGE, mask=valid, other=0).to(tl.int64)
        slot, place = page * of_sequence + head * of_head, token % PAGE
    else:
        slot = sequence.to(tl.int64) * of_sequence + head * of_head + token.to(tl.int64) * of_token
        place = token
    return slot, place


@triton.jit
def numbers_to(ptr, slot, place, PITCH: tl.constexpr, PAGED: tl.constexpr):
    """[TOKENS] int64: numbers from `ptr` to those of tokens, where `slots_of` says.

    Args:
        PITCH: numbers from one token to the next.
    """
    if PAGED:
        found = slot * (ALIGNED * 8 // ptr.dtype.element_ty.primitive_bitwidth) + place * PITCH
    else:
        found = slot * PITCH
    return found


@triton.jit
def halves(words):
    """[…, 2] int16: the low and the high half of words [...]."""
    return tl.join(words.to(tl.int16), (words >> 16).to(tl.int16))


@triton.jit
def fields(words, NUMBER: tl.constexpr, BITS: tl.constexpr, ABOVE: tl.constexpr):
    """[TOKENS, n, 2] int16: the NUMBER-th field of both halves of words [TOKENS, n], beside the bits of ABOVE."""
    return halves((words >> (NUMBER * BITS)) & ((1 << BITS) - 1) * 0x10001 | ABOVE * 0x10001)


@triton.jit
def levels(words, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """[TOKENS, n · 32 / BITS]: what is packed in words [TOKENS, n], in the order of `order_of`. Numbers are larger than
    what is stored, see `over` in `triton_launch.py`."""
    # The last bits of a 16-bit float of 2^7 or 2^10 count ones, so that nothing has to be converted.
    COUNTED: tl.constexpr = tl.float16 == DTYPE or (tl.bfloat16 == DTYPE and BITS < 8)
    ABOVE: tl.constexpr = (0x6400 if tl.float16 == DTYPE else 0x4300) if COUNTED else 0
    # Leaves are in the order in which joining makes the last dimensions, taken as one, count fields. Then four threads
    # of a tensor core that multiply a token's numbers unpack different words of it.
    if BITS == 8:
        tile = tl.join(fields(words, 0, BITS, ABOVE), fields(words, 1, BITS, ABOVE))
        tile = tl.permute(tile, (0, 1, 3, 2))
    elif BITS == 4:
        tile = tl.join(
            tl.join(fields(words, 0, BITS, ABOVE), fields(words, 2, BITS, ABOVE)),
            tl.join(fields(words, 1, BITS, ABOVE), fields(words, 3, BITS, ABOVE)),
        )
        tile = tl.permute(tile, (0, 3, 1, 4, 2))
    else:
        tile = tl.join(
            tl.join(
                tl.join(fields(words, 0, BITS, ABOVE), fields(words, 4, BITS, ABOVE)),
                tl.join(fields(words, 2, BITS, ABOVE), fields(words, 6, BITS, ABOVE)),
            ),
            tl.join(
                tl.join(fields(words, 1, BITS, ABOVE), fields(words, 5, BITS, ABOVE)),
                tl.join(fields(words, 3, BITS, ABOVE), fields(words, 7, BITS, ABOVE)),
            ),
        )
        tile = tl.permute(tile, (0, 3, 4, 1, 5, 2))
    tile = tl.reshape(tile, [words.shape[0], words.shape[1] * (32 // BITS)])
    return tile.to(DTYPE, bitcast=True) if COUNTED else tile.to(tl.float32).to(DTYPE)


@triton.jit
def capped(logits, cap):
    """cap tanh(logits / cap), without overflow at either end."""
    return cap * (1.0 - 2.0 / (1.0 + tl.exp2(logits * (2.0 * LOG2E) / cap)))


@triton.jit
def estimate(
    reduced_ptr, scale_ptr, word_ptr, slot, in_page, valid, projected, sums, by_word_ptr, cap,
    BITS: tl.constexpr, WIDTH: tl.constexpr, WIDTH_TILE: tl.constexpr, PITCH: tl.constexpr, PAGED: tl.constexpr,
    COLUMNS: tl.constexpr, DTYPE: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """([TOKENS, COLUMNS] float32 estimated logits, [TOKENS] codewords), of tokens that are not valid any numbers.

    Args:
        slot, in_page: see `slots_of`.
        projected: [r, COLUMNS], queries in the basis of the codes, in the order of `levels`.
        sums: [COLUMNS], what the levels' offset adds to products.
        WIDTH: words that are stored of a token, or numbers of a reduced key.
    """
    place = tl.arange(0, WIDTH_TILE)
    held = valid[:, None] & (place < WIDTH)[None, :]
    to = numbers_to(reduced_ptr, slot, in_page, PITCH, PAGED)
    number = tl.load(reduced_ptr + to[:, None] + place[None, :], mask=held, other=0)
    if BITS == REDUCED:
        logits = tl.dot(number.to(DTYPE), projected, input_precision="tf32x3")
        word = tl.zeros_like(slot).to(tl.int32)
    else:
        logits = tl.dot(levels(number, BITS, DTYPE), projected, input_precision="tf32x3")
        scale = tl.load(scale_ptr + numbers_to(scale_ptr, slot, in_page, 1, PAGED), mask=valid, other=0.0)
        scale = scale.to(tl.float32)
        word = tl.load(word_ptr + numbers_to(word_ptr, slot, in_page, 1, PAGED), mask=valid, other=0).to(tl.int32)
        column = tl.arange(0, COLUMNS)
        by_word = tl.load(by_word_ptr + word[:, None] * COLUMNS + column[None, :])
        logits = (logits - sums[None, :]) * scale[:, None] + by_word
    if CAPPED:
        logits = capped(logits, cap)
    return logits, word


def order_of(bits: int, rank: int, words: int) -> list[int | None]:
    """Which dimension of a code each of `levels` is; None: of no dimension.

    Args:
        rank: dimensions of a code. A byte holds some that lie as far apart as a code has bytes.
        words: how many the tile has of a token, some of them padding.
    """
    order: list[int | None] = []
    for place in range(words * 32 // bits):
        rest, half = divmod(place, 2)
        rest, odd_field = divmod(rest, 2)
        fields_before, word = divmod(rest, words)
        byte, shift = divmod(16 * half + bits * (2 * fields_before + odd_field), 8)
        byte, size = byte + 4 * word, rank * bits // 8
        order.append(byte + shift // bits * size if byte < size else None)
    return order
