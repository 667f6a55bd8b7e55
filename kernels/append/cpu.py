"""A new token with what is kept to scan it, in numba: one call takes the time of a few operations of torch."""

from __future__ import annotations

from collections import namedtuple

import numpy as np
from numba import prange

from ..codes.cpu import encode, multiply, nearest, pack
from ..cpu import compiled
from ..cpu.arithmetic import float_in, half_of, of_half
from ..cpu.pages import row
from ..cpu.rows import CODES, convert
from ..pages import PAGE
from ..scan.cpu import (
    CODE,
    CORRECTION,
    CORRECTION_SCALE,
    KEY,
    KEY_SCALE,
    SCALE,
    VALUE,
    VALUE_SCALE,
    WORD,
)

Steps = namedtuple("Steps", "bits code row")
"""Bits of the codes; and the largest distance of levels over the root mean square, of codes and of 8-bit rows."""


@compiled(parallel=True)
def append_coded(key_new, value_new, kind, new_kind, tokens, table, tables, lengths, steps, lines, codes):
    """
    Args:
        key_new, value_new: [B, Hkv, D] and [B, Hkv, Dv], as whole numbers.
        kind, new_kind: what numbers are kept as keys and values, and what those of `key_new` are, see `kernels.cpu`.
        tokens, tables: `kernels.scan.cpu.Tokens` and `kernels.codes.cpu.Tables`.
        table: see `cpu.pages`.
        lengths: [B] int32.
        lines, codes: [B · Hkv, 4, max(D, Dv, r)] float32 and [B · Hkv, bytes of a code] uint8, for what is at work.
    """
    batch, heads = key_new.shape[:2]
    for at in prange(batch * heads):
        unit = np.int64(at)
        append_token(
            unit // batch, unit % batch, key_new, value_new, kind, new_kind, tokens, table, tables, lengths, steps,
            lines[unit], codes[unit],
        )  # fmt: skip


@compiled()
def append_token(
    head, sequence, key_new, value_new, kind, new_kind, tokens, table, tables, lengths, steps, lines, codes
):  # fmt: skip
    """The token of one head."""
    token = np.int64(lengths[sequence])
    if not 0 <= token < table.pages.shape[1] * table.size:
        return
    page, offset, of_part = table.pages[sequence, token // table.size], token % table.size, tokens.steps
    width, values = key_new.shape[2], value_new.shape[2]
    key, value, difference, turned = lines[0, :width], lines[1, :values], lines[2], lines[3]
    convert(key_new[sequence], head, new_kind, key)
    convert(value_new[sequence], head, new_kind, value)
    word = nearest(key, value, tables, head)
    tokens.codewords[row(of_part[WORD], page, head, offset)] = word
    for dim in range(width):
        difference[dim] = key[dim] - float_in(tables.key[head], word, dim)
    multiply(difference, width, tables.key_map[head], turned)
    scale = encode(turned, tables.key_map.shape[2], steps.bits, steps.code, codes)
    tokens.scales[row(of_part[SCALE], page, head, offset)] = half_of(scale)
    pack(codes, tokens.codes[row(of_part[CODE], page, head, offset)])
    key_row = tokens.key[row(of_part[KEY], page, head, offset)]
    value_row = tokens.value[row(of_part[VALUE], page, head, offset)]
    if kind == CODES:
        multiply(difference, width, tables.turn_key.T, turned)
        scale = encode(turned, width, 8, steps.row, key_row)
        tokens.key_scale[row(of_part[KEY_SCALE], page, head, offset)] = half_of(scale)
        for dim in range(values):
            difference[dim] = value[dim] - float_in(tables.value[head], word, dim)
        multiply(difference, values, tables.turn_value.T, turned)
        scale = encode(turned, values, 8, steps.row, value_row)
        tokens.value_scale[row(of_part[VALUE_SCALE], page, head, offset)] = half_of(scale)
    else:
        for dim in range(width):
            key_row[dim] = key_new[sequence, head, dim]
        for dim in range(values):
            value_row[dim] = value_new[sequence, head, dim]
    if len(tokens.correction) and (token + 1) % PAGE == 0:
        correct(page, head, offset, kind, tokens, tables, steps, value, difference, turned)


@compiled()
def correct(page, head, offset, kind, tokens, tables, steps, line, mean, turned):
    """The mean over 64 tokens, of which the last lies at `offset`, of what codewords leave of values, in 8 bits.

    Args:
        line, mean, turned: [Dv or more] float32, for what is at work.
    """
    of_part, values = tokens.steps, tables.value.shape[2]
    for dim in range(values):
        mean[dim] = np.float32(0.0)
    for place in range(offset + 1 - PAGE, offset + 1):
        convert(tokens.value, row(of_part[VALUE], page, head, place), kind, line)
        if kind == CODES:
            scale = of_half(np.int32(tokens.value_scale[row(of_part[VALUE_SCALE], page, head, place)]))
            for dim in range(values):
                mean[dim] += line[dim] * scale
        else:
            word = tokens.codewords[row(of_part[WORD], page, head, place)]
            for dim in range(values):
                mean[dim] += line[dim] - float_in(tables.value[head], word, dim)
    for dim in range(values):
        mean[dim] /= np.float32(PAGE)
    number = offset // PAGE
    correction = tokens.correction[row(of_part[CORRECTION], page, head, number)]
    if kind == CODES:
        multiply(mean, values, tables.turn_value, turned)
        scale = encode(turned, values, 8, steps.row, correction)
    else:
        scale = encode(mean, values, 8, steps.row, correction)
    tokens.correction_scale[row(of_part[CORRECTION_SCALE], page, head, number)] = half_of(scale)
