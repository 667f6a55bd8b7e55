"""Codewords and codes of a few tokens in numba, where one call takes the time of a single operation of torch."""

from __future__ import annotations

import math
from collections import namedtuple

import numpy as np
from numba import prange

from ..cpu import compiled

Tables = namedtuple("Tables", "key value half inverse key_map turn_key turn_value")
"""`runtime.methods.codewords.Codewords.on`, by the names there; rotations are [0, 0] where rows are no codes."""
Kept = namedtuple("Kept", "codeword code scale key value row_scales")
"""[B, H, T, 1], [B, H, T, bytes] uint8 and [B, H, T] float32; and of rows that are codes [B, H, T, D], [B, H, T, Dv]
uint8 and [2, B, H, T] float32."""


@compiled(parallel=True)
def encode_tokens(key, value, tables, bits, step, row_step, workspace, kept):
    """Writes all of `kept`.

    Args:
        key, value: [B, H, T, D] and [B, H, T, Dv] float32.
        step, row_step: see `encode`, of codes and of 8-bit rows.
        workspace: [B · H · T, 2, max(D, Dv)] float32, for what is at work.
    """
    count = key.shape[0] * key.shape[1] * key.shape[2]
    for at in prange(count):
        encode_token(np.int64(at), key, value, tables, bits, step, row_step, workspace, kept)


@compiled()
def encode_token(at, key, value, tables, bits, step, row_step, workspace, kept):
    """A token of one head."""
    heads, tokens, rank = key.shape[1], key.shape[2], tables.key_map.shape[2]
    sequence, head, token = at // (heads * tokens), at // tokens % heads, at % tokens
    difference, turned = workspace[at, 0], workspace[at, 1]
    new_key, new_value = key[sequence, head, token], value[sequence, head, token]
    word = nearest(new_key, new_value, tables, head)
    kept.codeword[sequence, head, token, 0] = word
    for dim in range(len(new_key)):
        difference[dim] = new_key[dim] - tables.key[head, word, dim]
    multiply(difference, len(new_key), tables.key_map[head], turned)
    kept.scale[sequence, head, token] = encode(turned, rank, bits, step, kept.code[sequence, head, token])
    if kept.key.shape[3]:
        multiply(difference, len(new_key), tables.turn_key.T, turned)
        scale = encode(turned, len(new_key), 8, row_step, kept.key[sequence, head, token])
        kept.row_scales[0, sequence, head, token] = scale
        for dim in range(len(new_value)):
            difference[dim] = new_value[dim] - tables.value[head, word, dim]
        multiply(difference, len(new_value), tables.turn_value.T, turned)
        scale = encode(turned, len(new_value), 8, row_step, kept.value[sequence, head, token])
        kept.row_scales[1, sequence, head, token] = scale


@compiled()
def nearest(key, value, tables, head):
    """The codeword with the least ½|c|² − x·c, keys and values divided by their spreads."""
    word, least = 0, np.float32(np.inf)
    by_key, by_value = tables.inverse[head, 0, 0, 0], tables.inverse[head, 1, 0, 0]
    for candidate in range(tables.key.shape[1]):
        along = np.float32(0.0)
        for dim in range(len(key)):
            along += key[dim] * tables.key[head, candidate, dim]
        along *= by_key
        along_value = np.float32(0.0)
        for dim in range(len(value)):
            along_value += value[dim] * tables.value[head, candidate, dim]
        distance = tables.half[head, 0, candidate] - along - along_value * by_value
        if distance < least:
            word, least = candidate, distance
    return word


@compiled()
def multiply(vector, count, matrix, out):
    """out [n] = vector [count] · matrix [count, n]."""
    for column in range(matrix.shape[1]):
        out[column] = np.float32(0.0)
    for row in range(count):
        weight = vector[row]
        for column in range(matrix.shape[1]):
            out[column] += weight * matrix[row, column]


@compiled()
def encode(values, count, bits, step_of_deviation, codes):
    """As `kernels.codes.encode`: writes codes [bytes], returns the scale.

    Args:
        step_of_deviation: the largest distance of levels, over the root mean square.
    """
    square, most = np.float32(0.0), np.float32(0.0)
    for dim in range(count):
        square += values[dim] * values[dim]
        most = max(most, abs(values[dim]))
    half = 1 << (bits - 1)
    step = min(most / np.float32(half - 0.5), np.float32(math.sqrt(square / count)) * step_of_deviation)
    if not step > 0:
        step = np.float32(np.inf)
    fields = 8 // bits
    size, along = count // fields, np.float32(0.0)
    for place in range(size):
        byte = 0
        for field in range(fields):
            value = values[field * size + place]
            level = min(max(math.floor(value / step), -half), half - 1)
            along += value * np.float32(level + 0.5)
            byte |= (level + half) << (field * bits)
        codes[place] = byte
    return square / along if square > 0 else np.float32(0.0)
