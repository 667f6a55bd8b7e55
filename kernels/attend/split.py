"""Which tokens a program takes: cut on the device from counts and lengths that the host never sees.

Grids follow from shapes alone. Within them a part's length follows from how many tokens there really are, so that a
capacity far above the lengths, or one long sequence among short ones, leaves no program with more than its share.

A unit is what has a count of tokens: a group of queries of `attend`, a sequence of `dense`.
"""

import triton
import triton.language as tl


@triton.jit
def split(counts_ptr, units, most, splits, UNITS: tl.constexpr, TOKEN_TILE: tl.constexpr):
    """Cut the units' tokens into parts of equal length, however unequal the units: on average `splits` parts of each.

    Returns:
        [UNITS] tokens of each unit, [UNITS] parts of each unit, [UNITS] where its parts end in the list of all
        parts (at most units · splits + units - 1 of them), tokens of a part.
    """
    unit = tl.arange(0, UNITS)
    count = tl.load(counts_ptr + unit, mask=unit < units, other=0)
    count = tl.minimum(tl.maximum(count, 0), most)
    tokens = tl.sum(count.to(tl.int64), 0)
    length = tl.cdiv(tokens, units.to(tl.int64) * splits * TOKEN_TILE).to(tl.int32) * TOKEN_TILE
    length = tl.maximum(length, TOKEN_TILE)
    parts = tl.cdiv(count, length)
    return count, parts, tl.cumsum(parts, 0), length


@triton.jit
def part_of_program(counts_ptr, program, units, most, splits, UNITS: tl.constexpr, TOKEN_TILE: tl.constexpr):
    """(unit, begin, end) of the program-th part; unit >= units where there are fewer parts."""
    count, parts, ends, length = split(counts_ptr, units, most, splits, UNITS, TOKEN_TILE)
    unit = tl.sum((ends <= program).to(tl.int32), 0)
    mine = tl.arange(0, UNITS) == unit
    first = tl.sum(tl.where(mine, ends - parts, 0), 0)
    begin = (program - first) * length
    return unit, begin, tl.minimum(begin + length, tl.sum(tl.where(mine, count, 0), 0))


@triton.jit
def parts_of_unit(counts_ptr, unit, units, most, splits, UNITS: tl.constexpr, TOKEN_TILE: tl.constexpr):
    """(first part, how many) of a unit."""
    _, parts, ends, _ = split(counts_ptr, units, most, splits, UNITS, TOKEN_TILE)
    mine = tl.arange(0, UNITS) == unit
    return tl.sum(tl.where(mine, ends - parts, 0), 0), tl.sum(tl.where(mine, parts, 0), 0)
