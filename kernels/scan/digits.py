"""Adding up by codeword with one matrix product: a codeword's number has two digits, and weights stand in the columns
of the one, ones in those of the other."""

import triton
import triton.language as tl

from .tile import halves


@triton.jit
def digit_at(place, COUNT: tl.constexpr):
    """Which digit is in a place of `spread` and `one_hot`: even ones first."""
    return place % (COUNT // 2) * 2 + place // (COUNT // 2)


@triton.jit
def spread(weights, digit, COUNT: tl.constexpr, DTYPE: tl.constexpr):
    """[TOKENS, COLUMNS · COUNT]: a token's weights [TOKENS, COLUMNS] in the places of its digit, zeros in all others.

    A digit and the next are one word of two floats of 16 bits, which is chosen at once.
    """
    weights = weights.to(DTYPE)
    if tl.float32 == DTYPE:
        chosen = digit[:, None, None] == digit_at(tl.arange(0, COUNT), COUNT)[None, None, :]
        tile = tl.reshape(tl.where(chosen, weights[:, :, None], 0.0), [weights.shape[0], weights.shape[1] * COUNT])
    else:
        digit = tl.broadcast_to(digit[:, None], weights.shape)
        pair = (weights.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) << (digit % 2 * 16)
        digit = digit // 2
        if COUNT == 2:
            tile = chosen_pair(pair, digit, 0)
        elif COUNT == 4:
            tile = tl.join(chosen_pair(pair, digit, 0), chosen_pair(pair, digit, 1))
        else:
            tile = chosen_pairs(pair, digit, 0, 1)
        tile = tl.reshape(tile, [weights.shape[0], weights.shape[1] * COUNT])
        tile = tile.to(DTYPE, bitcast=True)
    return tile


@triton.jit
def one_hot(digit, COUNT: tl.constexpr, DTYPE: tl.constexpr):
    """[TOKENS, COUNT]: one in the place of a token's digit, zeros elsewhere."""
    if tl.float32 == DTYPE:
        tile = (digit[:, None] == digit_at(tl.arange(0, COUNT), COUNT)[None, :]).to(DTYPE)
    else:
        one = 0x3F80 if tl.bfloat16 == DTYPE else 0x3C00
        pair = one << digit % 2 * 16
        digit = digit // 2
        if COUNT == 16:
            tile = tl.join(chosen_pairs(pair, digit, 0, 2), chosen_pairs(pair, digit, 1, 2))
        else:
            tile = tl.join(
                tl.join(chosen_pairs(pair, digit, 0, 4), chosen_pairs(pair, digit, 2, 4)),
                tl.join(chosen_pairs(pair, digit, 1, 4), chosen_pairs(pair, digit, 3, 4)),
            )
        tile = tl.reshape(tile, [digit.shape[0], COUNT]).to(DTYPE, bitcast=True)
    return tile


@triton.jit
def chosen_pair(pair, digit, NUMBER: tl.constexpr):
    """[…, 2] int16: the pair where the digit is this number, zeros elsewhere."""
    return halves(tl.where(digit == NUMBER, pair, 0))


@triton.jit
def chosen_pairs(pair, digit, FIRST: tl.constexpr, STEP: tl.constexpr):
    """[…, 2, 2, 2] int16: those of four numbers, which lie STEP apart, in order when the last dimensions are one."""
    return tl.join(
        tl.join(chosen_pair(pair, digit, FIRST), chosen_pair(pair, digit, FIRST + 2 * STEP)),
        tl.join(chosen_pair(pair, digit, FIRST + STEP), chosen_pair(pair, digit, FIRST + 3 * STEP)),
    )
