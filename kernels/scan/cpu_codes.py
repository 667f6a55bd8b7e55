"""Estimated logits of a block of tokens, from their codes or from reduced keys.

Inner loops count tokens from 0, along slices. An index like first + token, which numba does not know to be positive, is
checked for every token, as negative ones count from the end.
"""

from __future__ import annotations

from collections import namedtuple

import numpy as np

from ..cpu import BFLOAT16, FLOAT16, FLOAT32, compiled
from ..cpu.arithmetic import field, float_of_bits, of_brain, of_half
from ..cpu.rows import capped

BLOCK = 256
"""Tokens at a time: their numbers fit into the first-level cache."""

LANES = 4
"""Queries that are handled at a time where each token goes to another place; a group is filled up to a multiple."""

HALF_WORD = np.int32(0xFFFF)
"""The low 16 bits of a word."""

Scored = namedtuple("Scored", "codes scales codewords")
"""What tokens of one head are scored by: [tokens, words] int32, [tokens] float16, [tokens] uint8."""
Query = namedtuple("Query", "projected sums by_word turned base threshold")
"""A head's queries, in units of log 2: [G, r] in the basis of the codes, in the order of `unpack`; [G] the sums of
these; [C, G or more] logits of codewords; [G, D] in the basis of the rows; [G] what weights are relative to; [G] the
score from which tokens are read."""
Scratch = namedtuple("Scratch", "words numbers spread logits")
"""[BLOCK] int32, [ROWS, BLOCK], [BLOCK] and [G or more, BLOCK] float32."""
ROWS = 16
"""Dimensions that are unpacked at a time, at most: those of a word of 2-bit codes."""


@compiled()
def fields(bits):
    """Numbers in a word of 32 bits, of codes or of a kind of floats."""
    return 2 if bits == FLOAT16 else 32 // bits


@compiled()
def dimension(row, rank, bits):
    """Which dimension a row of `unpack` is. A byte of codes holds dimensions that lie r / fields apart."""
    if bits > 8:
        return row
    per_byte = 8 // bits
    return row // per_byte + row % per_byte * (rank // per_byte)


@compiled()
def unpack(codes, first, step, count, word, bits, to, words, numbers):
    """numbers [ROWS, BLOCK], from row `to`: those in one word of tokens first, first + step, …, `count` of them."""
    held = codes[first:, word]
    if step == 1:  # nearly always, and then without a product for each token
        for token in range(count):
            words[token] = held[token]
    else:
        for token in range(count):
            words[token] = held[token * step]
    if bits <= 8:
        mask = np.int32((1 << bits) - 1)
        for number in range(32 // bits):
            line, shift = numbers[to + number], np.int32(number * bits)
            for token in range(BLOCK):
                line[token] = np.float32(field(words[token], shift, mask))
    elif bits == FLOAT32:
        for token in range(BLOCK):
            numbers[to, token] = float_of_bits(words[token])
    elif bits == BFLOAT16:
        for token in range(BLOCK):
            numbers[to, token] = of_brain(words[token])
            numbers[to + 1, token] = of_brain(field(words[token], np.int32(16), HALF_WORD))
    else:
        for token in range(BLOCK):
            numbers[to, token] = of_half(words[token])
            numbers[to + 1, token] = of_half(field(words[token], np.int32(16), HALF_WORD))


@compiled()
def multiply(query, first, dims, numbers, out):
    """out [G, BLOCK] += query [G, first to first + dims] · numbers [dims, BLOCK]; dims is a multiple of 4. Two queries
    and four dimensions at a time: as many as there are registers for."""
    group = query.shape[0]
    for row in range(0, group, 2):
        other = row + 1 if row + 1 < group else row
        for dim in range(0, dims, 4):
            at = first + dim
            a, b, c, d = query[row, at], query[row, at + 1], query[row, at + 2], query[row, at + 3]
            if other == row:
                for token in range(BLOCK):
                    s, t = numbers[dim, token], numbers[dim + 1, token]
                    u, v = numbers[dim + 2, token], numbers[dim + 3, token]
                    out[row, token] += a * s + b * t + c * u + d * v
            else:
                e, f, g, h = query[other, at], query[other, at + 1], query[other, at + 2], query[other, at + 3]
                for token in range(BLOCK):
                    s, t = numbers[dim, token], numbers[dim + 1, token]
                    u, v = numbers[dim + 2, token], numbers[dim + 3, token]
                    out[row, token] += a * s + b * t + c * u + d * v
                    out[other, token] += e * s + f * t + g * u + h * v


@compiled()
def estimate(scored, first, step, count, bits, offset, cap, query, work):
    """work.logits [G or more, BLOCK] of tokens first, first + step, …, `count` of them; of others any number.

    Args:
        offset: by how much codes are above what they stand for.
        cap: soft-capping; 0: none.
    """
    work.logits[:] = np.float32(0.0)
    per_word, rank = fields(bits), query.projected.shape[1]
    together = max(1, 4 // per_word)  # words of four dimensions, at least
    for word in range(0, rank // per_word, together):
        for other in range(together):
            unpack(scored.codes, first, step, count, word + other, bits, other * per_word, work.words, work.numbers)
        multiply(query.projected, word * per_word, together * per_word, work.numbers, work.logits)
    if query.by_word.shape[0]:
        scales, codewords = scored.scales[first:], scored.codewords[first:]
        if step == 1:
            for token in range(count):
                work.spread[token] = of_half(np.int32(scales[token]))
        else:
            for token in range(count):
                work.spread[token] = of_half(np.int32(scales[token * step]))
        for row in range(len(query.projected)):
            shift = offset * query.sums[row]
            for token in range(BLOCK):
                work.logits[row, token] = (work.logits[row, token] - shift) * work.spread[token]
        for row in range(0, len(work.logits), LANES):
            a, b, c, d = work.logits[row], work.logits[row + 1], work.logits[row + 2], work.logits[row + 3]
            for token in range(count):
                codeword = codewords[token * step]
                a[token] += query.by_word[codeword, row]
                b[token] += query.by_word[codeword, row + 1]
                c[token] += query.by_word[codeword, row + 2]
                d[token] += query.by_word[codeword, row + 3]
    if cap > 0:
        for row in range(len(query.projected)):
            for token in range(BLOCK):
                work.logits[row, token] = capped(work.logits[row, token], cap)
