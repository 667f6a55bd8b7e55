"""Estimated logits of a block of tokens, from their codes or from reduced keys.

Inner loops count tokens from 0, along slices. An index like first + token, which numba does not know to be positive, is
checked for every token, as negative ones count from the end.
"""

from __future__ import annotations

from collections import namedtuple

import numpy as np

from ..cpu import BFLOAT16, FLOAT16, FLOAT32, compiled
from ..cpu.arithmetic import field, float_of_bits, of_brain, of_half
from ..cpu.pages import find, row
from ..cpu.rows import capped

BLOCK = 256
"""Tokens at a time: their numbers fit into the first-level cache."""

LANES = 4
"""Queries that are handled at a time where each token goes to another place; a group is filled up to a multiple."""

HALF_WORD = np.int32(0xFFFF)
"""The low 16 bits of a word."""

Scored = namedtuple("Scored", "codes scales codewords steps")
"""What tokens are scored by: [rows, words] int32, [rows] float16, [rows] uint8; [3, 3] int64, the steps of each."""
CODE, SCALE, WORD = range(3)
"""Which steps are whose."""
Query = namedtuple("Query", "projected sums by_word turned base threshold")
"""A head's queries, in units of log 2: [G, r] in the basis of the codes, in the order of `unpack`; [G] the sums of
these; [C, G or more] logits of codewords; [G, D] in the basis of the rows; [G] what weights are relative to; [G] the
score from which tokens are read."""
Scratch = namedtuple("Scratch", "words numbers spread codewords logits")
"""[BLOCK] int32, [ROWS, BLOCK], [BLOCK] float32, [BLOCK] uint8 and [G or more, BLOCK] float32."""
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
def gather(rows, steps, head, step, spans, count, out):
    """out [BLOCK]: rows of every step-th token of `count` spans, each of which begins at its first token."""
    apart = step * steps[2]
    for span in range(count):
        held, to = rows[row(steps, spans.page[span], head, spans.offset[span]) :], out[spans.begin[span] :]
        many = spans.count[span]
        if apart == 1:  # nearly always, and then without a product for each token
            for token in range(many):
                to[token] = held[token]
        else:
            for token in range(many):
                to[token] = held[token * apart]


@compiled()
def unpack(codes, steps, head, step, spans, count, word, bits, to, words, numbers):
    """numbers [ROWS, BLOCK], from row `to`: those in one word of the tokens that `gather` takes."""
    gather(codes[:, word], steps, head, step, spans, count, words)
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
    for line in range(0, group, 2):
        other = line + 1 if line + 1 < group else line
        for dim in range(0, dims, 4):
            at = first + dim
            a, b, c, d = query[line, at], query[line, at + 1], query[line, at + 2], query[line, at + 3]
            if other == line:
                for token in range(BLOCK):
                    s, t = numbers[dim, token], numbers[dim + 1, token]
                    u, v = numbers[dim + 2, token], numbers[dim + 3, token]
                    out[line, token] += a * s + b * t + c * u + d * v
            else:
                e, f, g, h = query[other, at], query[other, at + 1], query[other, at + 2], query[other, at + 3]
                for token in range(BLOCK):
                    s, t = numbers[dim, token], numbers[dim + 1, token]
                    u, v = numbers[dim + 2, token], numbers[dim + 3, token]
                    out[line, token] += a * s + b * t + c * u + d * v
                    out[other, token] += e * s + f * t + g * u + h * v


@compiled()
def estimate(scored, table, sequence, head, first, step, count, spans, bits, offset, cap, query, work):
    """work.logits [G or more, BLOCK] of tokens first, first + step, …, `count` of them, and of others any number; and
    work.codewords of these tokens, where there are any.

    Args:
        spans: written; see `cpu.pages`.
        offset: by how much codes are above what they stand for.
        cap: soft-capping; 0: none.
    """
    found = find(table, sequence, first, step, count, spans)
    work.logits[:] = np.float32(0.0)
    per_word, rank = fields(bits), query.projected.shape[1]
    together = max(1, 4 // per_word)  # words of four dimensions, at least
    for word in range(0, rank // per_word, together):
        for other in range(together):
            unpack(
                scored.codes, scored.steps[CODE], head, step, spans, found, word + other, bits, other * per_word,
                work.words, work.numbers,
            )  # fmt: skip
        multiply(query.projected, word * per_word, together * per_word, work.numbers, work.logits)
    if query.by_word.shape[0]:
        gather(scored.codewords, scored.steps[WORD], head, step, spans, found, work.codewords)
        gather(scored.scales, scored.steps[SCALE], head, step, spans, found, work.words)
        for token in range(count):
            work.spread[token] = of_half(work.words[token])
        for line in range(len(query.projected)):
            shift = offset * query.sums[line]
            for token in range(BLOCK):
                work.logits[line, token] = (work.logits[line, token] - shift) * work.spread[token]
        for line in range(0, len(work.logits), LANES):
            a, b, c, d = work.logits[line], work.logits[line + 1], work.logits[line + 2], work.logits[line + 3]
            for token in range(count):
                codeword = work.codewords[token]
                a[token] += query.by_word[codeword, line]
                b[token] += query.by_word[codeword, line + 1]
                c[token] += query.by_word[codeword, line + 2]
                d[token] += query.by_word[codeword, line + 3]
    if cap > 0:
        for line in range(len(query.projected)):
            for token in range(BLOCK):
                work.logits[line, token] = capped(work.logits[line, token], cap)
