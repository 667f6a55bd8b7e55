"""Dense attention on a CPU, in numba: threads over sequences, heads and ranges of tokens.

A unit is a (head, sequence); a part is a range of a unit's tokens. Caches have heads first, [Hkv, B, capacity, …], as
token buffers have in memory; the partial results are those of `cpu.rows`.
"""

from __future__ import annotations

from collections import namedtuple

import numpy as np
from numba import prange

from ..cpu import compiled
from ..cpu.arithmetic import NONE, share
from ..cpu.rows import Rows, Running, attend

BLOCK = 64
"""Tokens at a time."""
Parts = namedtuple("Parts", "best mass rows words logits reads chosen lines")
"""`Running` of every part, and what is at work in one."""


@compiled(parallel=True)
def dense(query, key, value, kind, scales, codewords, lengths, cap, sink_logits, parts, ranges, per_range, out):
    """Phase 0 takes parts, phase 1 joins them.

    Args:
        query: [B, Hkv, G, D] float32, in units of log 2.
        scales, codewords: [0] of int16 and of uint8: rows are no codes.
        lengths: [B].
        sink_logits: [Hkv, G], likewise; -inf: none.
        out: [B, Hkv, G, Dv] float32, written.
    """
    batch, heads = query.shape[:2]
    for phase in range(2):
        count = batch * heads * ranges if phase == 0 else batch * heads
        for index in prange(count):
            at = np.int64(index)
            unit = at // ranges if phase == 0 else at
            head, sequence = unit // batch, unit % batch
            if phase == 0:
                start, stop = at % ranges * per_range, min((at % ranges + 1) * per_range, lengths[sequence])
                rows = Rows(key[head, sequence], value[head, sequence], scales, scales, codewords)
                take(rows, kind, start, stop, query[sequence, head], cap, parts, at)
            else:
                join(parts, unit * ranges, ranges, sink_logits[head], out[sequence, head])


@compiled()
def take(rows, kind, start, stop, query, cap, parts, part):
    running = Running(parts.best[part], parts.mass[part], parts.rows[part], parts.words)
    running.best[:], running.mass[:], running.rows[:] = NONE, np.float32(0.0), np.float32(0.0)
    reads, chosen = parts.reads, parts.chosen[part]
    for at in range(start, stop, BLOCK):
        count = min(BLOCK, stop - at)
        for token in range(count):
            chosen[token] = at + token
        attend(
            rows, kind, chosen, count, reads, query, parts.words, cap, running, parts.logits[part], parts.lines[part]
        )


@compiled()
def join(parts, first, ranges, sink_logits, out):
    for row in range(out.shape[0]):
        most = sink_logits[row]
        for part in range(first, first + ranges):
            most = max(most, parts.best[part, row])
        total = share(sink_logits[row], most)
        out[row] = np.float32(0.0)
        for part in range(first, first + ranges):
            weight = share(parts.best[part, row], most)
            total += weight * parts.mass[part, row]
            for dim in range(out.shape[1]):
                out[row, dim] += weight * parts.rows[part, row, dim]
        if total > 0:
            for dim in range(out.shape[1]):
                out[row, dim] /= total
