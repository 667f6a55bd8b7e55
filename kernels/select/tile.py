"""The kernel's pieces. A score becomes an int32 *key* that grows with it; a tile is [TILE / RUN, RUN] keys in order.

RUN neighbours belong to one thread, so that a prefix sum over the tile is one over threads: a third of the work.
"""

import triton
import triton.language as tl


@triton.jit
def ordered(score):
    """int32, in the order of the scores; the same for both zeros; meaningless for NaN."""
    if score.dtype.primitive_bitwidth == 16:
        bits = score.to(tl.int16, bitcast=True).to(tl.int32)
        key = tl.where(bits >= 0, bits, -32768 - bits)
    else:
        bits = score.to(tl.int32, bitcast=True)
        key = tl.where(bits >= 0, bits, -2147483648 - bits)
    return key


@triton.jit
def positions(start, TILE: tl.constexpr, RUN: tl.constexpr):
    return start + tl.arange(0, TILE // RUN)[:, None] * RUN + tl.arange(0, RUN)[None, :]


@triton.jit
def keys_at(row, position, end, LOWEST: tl.constexpr, UNIT: tl.constexpr):
    """Keys of a row's scores; LOWEST for those that are never chosen: -inf, NaN, and all from `end` on."""
    # Rounded up to UNIT, within the row: a mask that all scores of a 16-byte load share.
    score = tl.load(row + position, mask=position < tl.cdiv(end, UNIT) * UNIT, other=float("-inf"))
    return tl.where((position < end) & (score > float("-inf")), ordered(score), LOWEST)


@triton.jit
def kth_largest(key, lowest, k, slack):
    """The largest bound from `lowest` on that at least k and, if bounds allow, at most k + slack keys reach.

    At least k keys must reach `lowest`. The range is cut in three, since one sum over the tile takes both counts.
    """
    key = tl.ravel(key, can_reorder=True)
    above = tl.max(key, 0) + 1
    lowest = tl.maximum(lowest, tl.min(tl.where(key >= lowest, key, above), 0))
    while lowest + 1 < above:
        width = (above - lowest).to(tl.uint32, bitcast=True)  # up to 32 bits, without a sign
        third = tl.maximum(width // 3, 1).to(tl.int32)
        low, high = lowest + third, above - third
        reaching = tl.sum((key >= low).to(tl.int32) + ((key >= high).to(tl.int32) << 16), 0)
        reaching_low, reaching_high = reaching & 0xFFFF, reaching >> 16
        lowest = tl.where(reaching_high >= k, high, tl.where(reaching_low >= k, low, lowest))
        above = tl.where(reaching_high >= k, above, tl.where(reaching_low >= k, high, low))
        reaching_lowest = tl.where(reaching_high >= k, reaching_high, reaching_low)
        good_enough = (reaching_lowest >= k) & (reaching_lowest <= k + slack)
        above = tl.where(good_enough, lowest + 1, above)
    return lowest


@triton.jit
def count_of(flags):
    return tl.sum(tl.ravel(flags.to(tl.int32), can_reorder=True), 0)


@triton.jit
def summed_before(numbers):
    """The sum over all that come before each number of the tile, and over all of them."""
    of_run = tl.sum(numbers, 1)
    before_run = tl.cumsum(of_run, 0) - of_run
    return before_run[:, None] + tl.cumsum(numbers, 1) - numbers, tl.sum(of_run, 0)


@triton.jit
def sampled_bound(row, length, k, LOWEST: tl.constexpr, SAMPLE: tl.constexpr):
    """A key that the k-th largest reaches, nearly surely: an order statistic of one score from each of SAMPLE strata.

    The rank is five standard deviations beyond the expected one. LOWEST + 1, which every score reaches, where the
    sample is too small.
    """
    stratum = length // SAMPLE
    number = tl.arange(0, SAMPLE)
    # Multiples of the golden ratio: no period of the scores can fall in step with them.
    within = ((number.to(tl.uint32) * 2654435769) >> 17).to(tl.int32) * stratum >> 15
    key = keys_at(row, number * stratum + within, length, LOWEST, 1)
    expected = k.to(tl.float32) / stratum.to(tl.float32)
    rank = (expected + 5.0 * tl.sqrt(expected) + 4.0).to(tl.int32)
    bound = LOWEST + 1
    if count_of(key > LOWEST) >= rank:
        bound = kth_largest(key, bound, rank, rank // 8)
    return bound


@triton.jit
def write_chosen(key, position, threshold, index, larger, equal, ties):
    """Appends the positions of keys above the threshold, and of the first `ties` that equal it, to `index`.

    `larger` and `equal` say how many there were in earlier tiles; returned with this tile's.
    """
    # Both in one prefix sum: each is at most TILE, below 2^15.
    tie = key == threshold
    before, total = summed_before((key > threshold).to(tl.int32) + (tie.to(tl.int32) << 16))
    larger_before = larger + (before & 0xFFFF)
    equal_before = equal + (before >> 16)
    chosen = (key > threshold) | (tie & (equal_before < ties))
    tl.store(index + larger_before + tl.minimum(equal_before, ties), position, mask=chosen)
    return larger + (total & 0xFFFF), equal + (total >> 16)
