"""A new token with what is kept to scan it, in numba: one call takes the time of a few operations of torch."""

from __future__ import annotations

from collections import namedtuple

import numpy as np
from numba import prange

from ..codes.cpu import encode, multiply, nearest, pack
from ..cpu import compiled
from ..cpu.arithmetic import float_in, half_of, of_half
from ..cpu.rows import CODES, convert
from ..scan.operands import PAGE

Steps = namedtuple("Steps", "bits code row")
"""Bits of the codes; and the largest distance of levels over the root mean square, of codes and of 8-bit rows."""


@compiled(parallel=True)
def append_coded(key_new, value_new, kind, new_kind, tokens, tables, lengths, steps, lines, codes):
    """
    Args:
        key_new, value_new: [B, Hkv, D] and [B, Hkv, Dv], as whole numbers.
        kind, new_kind: what numbers are kept as keys and values, and what those of `key_new` are, see `kernels.cpu`.
        tokens, tables: `kernels.scan.cpu.Tokens`, heads first, and `kernels.codes.cpu.Tables`.
        lengths: [B] int32.
        lines, codes: [B · Hkv, 4, max(D, Dv, r)] float32 and [B · Hkv, bytes of a code] uint8, for what is at work.
    """
    batch, heads = key_new.shape[:2]
    for at in prange(batch * heads):
        unit = np.int64(at)
        append_token(
            unit // batch, unit % batch, key_new, value_new, kind, new_kind, tokens, tables, lengths, steps,
            lines[unit], codes[unit],
        )  # fmt: skip


@compiled()
def append_token(
    head, sequence, key_new, value_new, kind, new_kind, tokens, tables, lengths, steps, lines, codes
):  # fmt: skip
    """The token of one head."""
    token = np.int64(lengths[sequence])
    if not 0 <= token < tokens.key.shape[2]:
        return
    width, values = key_new.shape[2], value_new.shape[2]
    key, value, difference, turned = lines[0, :width], lines[1, :values], lines[2], lines[3]
    convert(key_new[sequence], head, new_kind, key)
    convert(value_new[sequence], head, new_kind, value)
    word = nearest(key, value, tables, head)
    tokens.codewords[head, sequence, token] = word
    for dim in range(width):
        difference[dim] = key[dim] - float_in(tables.key[head], word, dim)
    multiply(difference, width, tables.key_map[head], turned)
    scale = encode(turned, tables.key_map.shape[2], steps.bits, steps.code, codes)
    tokens.scales[head, sequence, token] = half_of(scale)
    pack(codes, tokens.codes[head, sequence, token])
    if kind == CODES:
        multiply(difference, width, tables.turn_key.T, turned)
        scale = encode(turned, width, 8, steps.row, tokens.key[head, sequence, token])
        tokens.key_scale[head, sequence, token] = half_of(scale)
        for dim in range(values):
            difference[dim] = value[dim] - float_in(tables.value[head], word, dim)
        multiply(difference, values, tables.turn_value.T, turned)
        scale = encode(turned, values, 8, steps.row, tokens.value[head, sequence, token])
        tokens.value_scale[head, sequence, token] = half_of(scale)
    else:
        for dim in range(width):
            tokens.key[head, sequence, token, dim] = key_new[sequence, head, dim]
        for dim in range(values):
            tokens.value[head, sequence, token, dim] = value_new[sequence, head, dim]
    if tokens.correction.shape[2] and (token + 1) % PAGE == 0:
        correct(head, sequence, token // PAGE, kind, tokens, tables, steps, value, difference, turned)


@compiled()
def correct(head, sequence, page, kind, tokens, tables, steps, line, mean, turned):
    """The mean over a page of what codewords leave of values, in 8 bits.

    Args:
        line, mean, turned: [Dv or more] float32, for what is at work.
    """
    rows, values = tokens.value[head, sequence], tables.value.shape[2]
    for dim in range(values):
        mean[dim] = np.float32(0.0)
    for token in range(page * PAGE, (page + 1) * PAGE):
        convert(rows, token, kind, line)
        if kind == CODES:
            scale = of_half(np.int32(tokens.value_scale[head, sequence, token]))
            for dim in range(values):
                mean[dim] += line[dim] * scale
        else:
            word = tokens.codewords[head, sequence, token]
            for dim in range(values):
                mean[dim] += line[dim] - float_in(tables.value[head], word, dim)
    for dim in range(values):
        mean[dim] /= np.float32(PAGE)
    if kind == CODES:
        multiply(mean, values, tables.turn_value, turned)
        scale = encode(turned, values, 8, steps.row, tokens.correction[head, sequence, page])
    else:
        scale = encode(mean, values, 8, steps.row, tokens.correction[head, sequence, page])
    tokens.correction_scale[head, sequence, page] = half_of(scale)
