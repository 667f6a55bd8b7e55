"""Codewords and codes of one vector, in numba."""

from __future__ import annotations

import math
from collections import namedtuple
from typing import TYPE_CHECKING

import numpy as np

from ..cpu import compiled, short
from ..cpu.arithmetic import float_in
from . import LARGEST_SCALE

if TYPE_CHECKING:
    from . import Calibrated

Tables = namedtuple("Tables", "key value half inverse key_map turn_key turn_value")
"""`Calibrated`, by the names there; codewords as `short` has them."""
LARGEST = np.float32(LARGEST_SCALE)


def tables_of(tables: Calibrated) -> Tables:
    """The same memory as arrays, and codewords as `short` has them."""
    words = {name: short(tables[name]) for name in ("key", "value")}
    return Tables(**words, **{name: tables[name].numpy() for name in Tables._fields if name not in words})


@compiled()
def nearest(key, value, tables, head):
    """The codeword with the least ½|c|² − x·c, keys and values divided by their spreads."""
    keys, values, word, least = tables.key[head], tables.value[head], 0, np.float32(np.inf)
    by_key, by_value = tables.inverse[head, 0, 0, 0], tables.inverse[head, 1, 0, 0]
    for candidate in range(len(keys)):
        along = np.float32(0.0)
        for dim in range(len(key)):
            along += key[dim] * float_in(keys, candidate, dim)
        along *= by_key
        along_value = np.float32(0.0)
        for dim in range(len(value)):
            along_value += value[dim] * float_in(values, candidate, dim)
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
    """As `kernels.codes.encode`: writes codes [bytes], returns the scale, float32.

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
    return min(square / along, LARGEST) if square > 0 else np.float32(0.0)


@compiled()
def pack(codes, words):
    """Bytes as words of 32 bits, the first lowest."""
    for word in range(len(words)):
        packed = np.int32(0)
        for byte in range(4):
            packed |= np.int32(codes[4 * word + byte]) << np.int32(8 * byte)
        words[word] = packed
