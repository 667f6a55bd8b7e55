"""Functions of single numbers that numba has not, of few instructions each, so that loops over them are vectorised."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from . import compiled

NONE = np.float32(-np.inf)
LEAST, LARGEST = np.float32(-126.0), np.float32(127.0)
"""Exponents of `exp2`."""


@intrinsic
def float_of_bits(typing: Any, bits: Any) -> Any:
    """The float32 with these bits, an int32."""

    def generate(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        return builder.bitcast(operands[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def field(typing: Any, word: Any, shift: Any, mask: Any) -> Any:
    """word >> shift & mask, word unsigned. numba's own operators widen to 64 bits, and vectors hold half as many."""

    def generate(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        return builder.and_(builder.lshr(operands[0], operands[1]), operands[2])

    return types.int32(types.int32, types.int32, types.int32), generate


@intrinsic
def bits_of_float(typing: Any, number: Any) -> Any:
    """The bits of a float32 as an int32."""

    def generate(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        return builder.bitcast(operands[0], ir.IntType(32))

    return types.int32(types.float32), generate


@intrinsic
def prefetch(typing: Any, rows: Any, row: Any, column: Any) -> Any:
    """Bring the cache line of `rows[row, column]` near."""

    def generate(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        kind = signature.args[0]
        made = context.make_array(kind)(context, builder, operands[0])
        place = cgutils.get_item_pointer(context, builder, kind, made, list(operands[1:]), wraparound=False)
        number = ir.IntType(32)
        call = ir.FunctionType(ir.VoidType(), [place.type, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, call, "llvm.prefetch.p0")
        reading, keep, data = number(0), number(3), number(1)
        builder.call(function, [place, reading, keep, data])
        return context.get_dummy_value()

    return types.void(rows, row, column), generate


@compiled()
def exp2(x):
    """2^x with a relative error below 2e-7, x clamped to what float32 has exponents for: 2^-126 for -inf."""
    x = min(max(x, LEAST), LARGEST)
    whole = np.floor(x)
    part = x - whole
    # The polynomial of degree 6 that fits 2^part on [0, 1] best (Chebyshev's nodes).
    value = np.float32(0.00021865785)
    value = value * part + np.float32(0.0012391332)
    value = value * part + np.float32(0.0096841864)
    value = value * part + np.float32(0.05548063)
    value = value * part + np.float32(0.24023046)
    value = value * part + np.float32(0.69314694)
    value = value * part + np.float32(1.0)
    return value * float_of_bits((np.int32(whole) + np.int32(127)) << np.int32(23))


@compiled()
def share(logit, most):
    """2^(logit - most); 0 of none."""
    return exp2(logit - most) if logit > NONE else np.float32(0.0)


@compiled()
def of_half(bits):
    """The float32 of a finite float16, given as int32 whose low 16 bits are its bits."""
    sign, rest = field(bits, np.int32(15), np.int32(1)), field(bits, np.int32(0), np.int32(0x7FFF))
    return float_of_bits(np.int32(sign << np.int32(31) | rest << np.int32(13))) * np.float32(2.0**112)


@compiled()
def half_of(number):
    """The bits of the float16 nearest to a float32 from 0 to 65504, as int16; of anything larger, not a number."""
    if not number <= np.float32(65504.0):
        return np.int16(0x7E00)
    if number < np.float32(2.0**-14):
        # Beside 1/2 the last bit of a float32 counts 2^-24, as that of such a float16 does.
        return np.int16(bits_of_float(number + np.float32(0.5)) - np.int32(0x3F000000))
    bits = bits_of_float(number)
    odd = (bits >> np.int32(13)) & np.int32(1)  # halves are rounded to even
    return np.int16((bits - np.int32(0x38000000) + np.int32(0xFFF) + odd) >> np.int32(13))


@compiled()
def of_brain(bits):
    """The float32 of a bfloat16, given as int32 whose low 16 bits are its bits."""
    return float_of_bits(bits << np.int32(16))


@compiled()
def float_in(table, row, column):
    """The number of a table that is kept in float32 or in bfloat16, see `short`."""
    if table.itemsize == 4:
        return float_of_bits(np.int32(table[row, column]))
    return of_brain(np.int32(table[row, column]))
