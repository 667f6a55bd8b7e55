"""Dense attention on a CPU, in numba: threads over sequences, heads and ranges of tokens.

A unit is a (head, sequence); a part is a range of a unit's tokens. Caches are lists of rows (`cpu.pages`); the partial
results are those of `cpu.rows`.
"""

from __future__ import annotations

from collections import namedtuple

import numpy as np
from numba import prange

from ..cpu import compiled
from ..cpu.arithmetic import NONE, share
from ..cpu.pages import find, spans_in
from ..cpu.rows import Running, attend

BLOCK = 64
"""Tokens at a time."""
Parts = namedtuple("Parts", "best mass rows words logits reads pages offsets spans lines")
"""`Running` of every part, and what is at work in one."""


@compiled(parallel=True)
def dense(query, rows, table, kind, lengths, cap, sink_logits, parts, ranges, per_range, out):
    """Phase 0 takes parts, phase 1 joins them.

    Args:
        query: [B, Hkv, G, D] float32, in units of log 2.
        rows: `cpu.rows.Rows` of keys and values that are no codes.
        table: see `cpu.pages`.
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
                take(rows, table, sequence, head, kind, start, stop, query[sequence, head], cap, parts, at)
            else:
                join(parts, unit * ranges, ranges, sink_logits[head], out[sequence, head])


@compiled()
def take(rows, table, sequence, head, kind, start, stop, query, cap, parts, part):
    running = Running(parts.best[part], parts.mass[part], parts.rows[part], parts.words)
    running.best[:], running.mass[:], running.rows[:] = NONE, np.float32(0.0), np.float32(0.0)
    pages, offsets, spans = parts.pages[part], parts.offsets[part], spans_in(parts.spans[part])
    for at in range(start, stop, BLOCK):
        count = min(BLOCK, stop - at)
        for span in range(find(table, sequence, at, np.int64(1), count, spans)):
            first = spans.begin[span]
            for token in range(spans.count[span]):
                pages[first + token], offsets[first + token] = spans.page[span], spans.offset[span] + token
        attend(
            rows, kind, head, pages, offsets, count, parts.reads, query, parts.words, cap, running, parts.logits[part],
            parts.lines[part],
        )  # fmt: skip


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
