"""Exact attention to rows, the keys and values of tokens, whatever numbers they are kept in."""

from __future__ import annotations

from collections import namedtuple

import numpy as np

from . import BFLOAT16, LOG2_E, compiled
from .arithmetic import NONE, exp2, float_of_bits, of_brain, of_half, prefetch, share
from .pages import row

CODES = 8
"""The kind of rows that are 8-bit codes; other kinds are those of `kernels.cpu`."""
CODES_OFFSET = np.float32(127.5)
TWICE_LOG2_E = np.float32(2 * LOG2_E)
LINE = 64
"""Bytes of a cache line."""

Rows = namedtuple("Rows", "key value key_scale value_scale codewords steps")
"""Lists of rows: [rows, D], [rows, Dv]; and where these are codes [rows] each: float16 scales, and codewords. [5, 3]
int64, the steps of each list (see `cpu.pages`)."""
KEY, VALUE, KEY_SCALE, VALUE_SCALE, CODEWORDS = range(5)
"""Which steps are whose."""
Running = namedtuple("Running", "best mass rows words")
"""A running softmax: the largest logit [G], the mass Σ 2^(logit - best) [G], and with these weights Σ weight · value
[G, Dv]. Where rows are codes, that is Σ weight · scale · level, still rotated, and words [C, G] is the mass by
codeword."""


@compiled()
def convert(rows, token, kind, line):
    """line: float32 numbers of rows[token]; of 8-bit codes the multiples of their scale."""
    # The compiler knows sizes, and drops the other branches.
    if rows.itemsize == 1:
        for dim in range(rows.shape[1]):
            line[dim] = np.float32(rows[token, dim]) - CODES_OFFSET
    elif rows.itemsize == 4:
        for dim in range(rows.shape[1]):
            line[dim] = float_of_bits(np.int32(rows[token, dim]))
    elif kind == BFLOAT16:
        for dim in range(rows.shape[1]):
            line[dim] = of_brain(np.int32(rows[token, dim]))
    else:
        for dim in range(rows.shape[1]):
            line[dim] = of_half(np.int32(rows[token, dim]))


@compiled()
def approach(rows, page, head, offset):
    """Bring a token's key and value near, some time before they are read."""
    step = LINE // rows.key.itemsize
    key, value = row(rows.steps[KEY], page, head, offset), row(rows.steps[VALUE], page, head, offset)
    for dim in range(0, rows.key.shape[1], step):
        prefetch(rows.key, key, dim)
    for dim in range(0, rows.value.shape[1], step):
        prefetch(rows.value, value, dim)


@compiled()
def capped(logit, cap):
    """cap · tanh(logit / cap), both in units of log 2."""
    return cap * (np.float32(1.0) - np.float32(2.0) / (np.float32(1.0) + exp2(TWICE_LOG2_E * logit / cap)))


@compiled()
def attend(rows, kind, head, pages, offsets, count, reads, query, by_word, cap, running, logits, lines):
    """Take `count` tokens into the running softmax.

    Args:
        pages, offsets: [count], where each token lies.
        reads: [G or 1, count] uint8, which queries read which of them.
        query: [G, D], in units of log 2.
        by_word: [C, G or more], logits of codewords, likewise.
        cap: soft-capping, likewise; 0: none.
        logits, lines: [G, count rounded up to 4] and [4, max(D, Dv)], for what is at work.
    """
    group = query.shape[0]
    for place in range(0, count, 4):
        for number in range(4):
            at = min(place + number, count - 1)
            convert(rows.key, row(rows.steps[KEY], pages[at], head, offsets[at]), kind, lines[number])
        for query_head in range(group):
            a, b, c, d = np.float32(0.0), np.float32(0.0), np.float32(0.0), np.float32(0.0)
            for dim in range(query.shape[1]):
                a += query[query_head, dim] * lines[0, dim]
                b += query[query_head, dim] * lines[1, dim]
                c += query[query_head, dim] * lines[2, dim]
                d += query[query_head, dim] * lines[3, dim]
            logits[query_head, place], logits[query_head, place + 1] = a, b
            logits[query_head, place + 2], logits[query_head, place + 3] = c, d
    if rows.key.itemsize == 1:
        for place in range(count):
            page, offset = pages[place], offsets[place]
            scale = of_half(np.int32(rows.key_scale[row(rows.steps[KEY_SCALE], page, head, offset)]))
            word = rows.codewords[row(rows.steps[CODEWORDS], page, head, offset)]
            for query_head in range(group):
                logits[query_head, place] = logits[query_head, place] * scale + by_word[word, query_head]
    for query_head in range(group):
        weigh(reads[min(query_head, len(reads) - 1)], count, cap, running, query_head, logits[query_head])
    if rows.key.itemsize == 1:
        for place in range(count):
            page, offset = pages[place], offsets[place]
            scale = of_half(np.int32(rows.value_scale[row(rows.steps[VALUE_SCALE], page, head, offset)]))
            word = rows.codewords[row(rows.steps[CODEWORDS], page, head, offset)]
            for query_head in range(group):
                running.words[word, query_head] += logits[query_head, place]
                logits[query_head, place] *= scale
    for place in range(0, count, 4):
        for number in range(4):
            at = min(place + number, count - 1)
            convert(rows.value, row(rows.steps[VALUE], pages[at], head, offsets[at]), kind, lines[number])
        for query_head in range(group):
            weights, total = logits[query_head], running.rows[query_head]
            a, b, c, d = weights[place], weights[place + 1], weights[place + 2], weights[place + 3]
            for dim in range(len(total)):
                total[dim] += a * lines[0, dim] + b * lines[1, dim] + c * lines[2, dim] + d * lines[3, dim]


@compiled()
def weigh(reads, count, cap, running, row, logits):
    """Turn logits into weights relative to the running softmax of query `row`; 0 of what it does not read, and up to a
    multiple of 4."""
    most = running.best[row]
    for place in range(count):
        logit = capped(logits[place], cap) if cap > 0 else logits[place]
        logits[place] = logit if reads[place] else NONE
        most = max(most, logits[place])
    if most > running.best[row]:
        rise(running, row, most)
    total = np.float32(0.0)
    for place in range(count):
        weight = share(logits[place], most)
        logits[place] = weight
        total += weight
    running.mass[row] += total
    for place in range(count, -(-count // 4) * 4):
        logits[place] = np.float32(0.0)


@compiled()
def rise(running, row, most):
    """Let `most` be the largest logit of query `row`."""
    fade = share(running.best[row], most)
    running.best[row] = most
    running.mass[row] *= fade
    for dim in range(running.rows.shape[1]):
        running.rows[row, dim] *= fade
    for word in range(running.words.shape[0]):
        running.words[word, row] *= fade
