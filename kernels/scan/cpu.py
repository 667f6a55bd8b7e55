"""The scan on a CPU, in numba: threads over sequences, heads and ranges of tokens.

A unit is a (head, sequence); a part is a range of a unit's tokens. Arrays have heads first, as token buffers have in
memory: [Hkv, B, capacity, …]. Logits are in units of log 2.
"""

from __future__ import annotations

from collections import namedtuple

import numpy as np
from numba import prange

from ..cpu import compiled
from ..cpu.arithmetic import NONE, float_in, of_half, share
from ..cpu.rows import CODES, CODES_OFFSET, Rows, Running, approach, attend
from .cpu_choice import mark_read, thresholds
from .cpu_codes import BLOCK, LANES, Query, Scored, Scratch, dimension, estimate
from .operands import PAGE

Tokens = namedtuple("Tokens", "codes scales codewords key value key_scale value_scale correction correction_scale")
Tables = namedtuple("Tables", "query_map keys values turn_key turn_value")
"""[Hkv, D, r]; codewords [Hkv, C, D] and [Hkv, C, Dv]; and where rows are codes [D, D] and [Dv, Dv]."""
Budget = namedtuple("Budget", "first begin length stride rank")
"""[B] int64 each, see `kernels.scan.Budget`."""
Settings = namedtuple("Settings", "bits offset kind mode residual factor cap")
Others = namedtuple("Others", "mass words pages")
"""Tokens that are not read, by estimated weights relative to the head's base: [G], by codeword [C, G or more],
corrections [G, Dv]."""
Units = namedtuple("Units", "projected sums by_word turned base threshold logits scores")
"""`Query` of every unit; [units, G, n] and [units, n]: what its sample takes."""
Parts = namedtuple(
    "Parts",
    "best mass rows exact_words other_mass words pages codes numbers spread logits score exact reads marks some chosen "
    "lines",
)
"""`Running` and `Others` of every part, and what is at work in one."""


@compiled(parallel=True)
def scan(query, tokens, tables, budget, settings, sink_logits, units, parts, ranges, per_range, read, out):
    """Phase 0 prepares units, phase 1 takes parts, phase 2 joins them: one loop, because each takes long to compile.

    Args:
        query: [B, Hkv, G, D] float32.
        sink_logits: [Hkv, G]; -inf: none.
        ranges, per_range: how many parts a unit has, and tokens of each, a multiple of `BLOCK`.
        read: [B, Hkv, G or 1, longest] uint8, written.
        out: [B, Hkv, G, Dv] float32, written.
    """
    batch, heads = query.shape[:2]
    for phase in range(3):
        count = batch * heads * ranges if phase == 1 else batch * heads
        for index in prange(count):
            at = np.int64(index)
            unit = at // ranges if phase == 1 else at
            head, sequence = unit // batch, unit % batch
            if phase == 0:
                prepare(
                    query[sequence, head], tokens, tables, budget, settings, head, sequence, units, unit, parts, ranges
                )
            elif phase == 1:
                start = at % ranges * per_range
                scan_range(
                    tokens, budget, settings, head, sequence, units, unit, parts, at, start, start + per_range,
                    read[sequence, head],
                )  # fmt: skip
            else:
                finish(
                    parts, unit * ranges, ranges, units.base[unit], tables, settings, head, sink_logits[head],
                    out[sequence, head],
                )  # fmt: skip


@compiled()
def shared_of(units, unit):
    return Query(
        units.projected[unit], units.sums[unit], units.by_word[unit], units.turned[unit], units.base[unit],
        units.threshold[unit],
    )  # fmt: skip


@compiled()
def scratch_of(parts, part):
    return Scratch(parts.codes[part], parts.numbers[part], parts.spread[part], parts.logits[part])


@compiled()
def scored_of(tokens, head, sequence):
    return Scored(tokens.codes[head, sequence], tokens.scales[head, sequence], tokens.codewords[head, sequence])


@compiled()
def prepare(query, tokens, tables, budget, settings, head, sequence, units, unit, parts, ranges):
    """What a unit's parts share: queries [G, D] in the bases of codes and of rows, and thresholds."""
    scored, shared, work = scored_of(tokens, head, sequence), shared_of(units, unit), scratch_of(parts, unit * ranges)
    logits, rank, line = units.logits[unit], tables.query_map.shape[2], parts.lines[unit * ranges, 0]
    for row in range(len(query)):
        project(query[row], tables.query_map[head], settings.factor, line)
        shared.sums[row] = np.float32(0.0)
        for place in range(rank):
            shared.projected[row, place] = line[dimension(place, rank, settings.bits)]
            shared.sums[row] += shared.projected[row, place]
        if settings.kind == CODES:
            project(query[row], tables.turn_key.T, settings.factor, shared.turned[row])
        else:
            for dim in range(query.shape[1]):
                shared.turned[row, dim] = query[row, dim] * settings.factor
    logits_of_codewords(query, tables.keys[head], settings.factor, shared.by_word)
    first, begin, stride = budget.first[sequence], budget.begin[sequence], budget.stride[sequence]
    at, sampled = -(-first // stride) * stride, 0
    while at < begin:
        count = min(BLOCK, -(-(begin - at) // stride))
        estimate(scored, at, stride, count, settings.bits, settings.offset, settings.cap, shared, work)
        for row in range(len(query)):
            for token in range(count):
                logits[row, sampled + token] = work.logits[row, token]
        sampled += count
        at += count * stride
    place = budget.rank[sequence]
    thresholds(logits, units.scores[unit], sampled, place, settings.mode, shared.base, shared.threshold)


@compiled()
def project(query, matrix, factor, out):
    """out [n] = query [D] · matrix [D, n] · factor."""
    for column in range(matrix.shape[1]):
        out[column] = np.float32(0.0)
    for dim in range(len(query)):
        weight = query[dim] * factor
        for column in range(matrix.shape[1]):
            out[column] += weight * matrix[dim, column]


@compiled()
def logits_of_codewords(query, keys, factor, out):
    """out [C, G or more] = keys [C, D] · query [G, D] · factor, four queries at a time; beyond G, where nothing reads
    them, those of the last query."""
    last = len(query) - 1
    for word in range(len(keys)):
        for row in range(0, out.shape[1], LANES):
            a, b, c, d = np.float32(0.0), np.float32(0.0), np.float32(0.0), np.float32(0.0)
            for dim in range(query.shape[1]):
                number = float_in(keys, word, dim)
                a += query[min(row, last), dim] * number
                b += query[min(row + 1, last), dim] * number
                c += query[min(row + 2, last), dim] * number
                d += query[min(row + 3, last), dim] * number
            out[word, row], out[word, row + 1] = a * factor, b * factor
            out[word, row + 2], out[word, row + 3] = c * factor, d * factor


@compiled()
def scan_range(tokens, budget, settings, head, sequence, units, unit, parts, part, start, stop, read):
    """Tokens from `start` to `stop` of one unit: exactly what is read, and the others by their estimates."""
    scored, shared, work = scored_of(tokens, head, sequence), shared_of(units, unit), scratch_of(parts, part)
    rows = Rows(
        tokens.key[head, sequence], tokens.value[head, sequence], tokens.key_scale[head, sequence],
        tokens.value_scale[head, sequence], scored.codewords,
    )  # fmt: skip
    running = Running(parts.best[part], parts.mass[part], parts.rows[part], parts.exact_words[part])
    others = Others(parts.other_mass[part], parts.words[part], parts.pages[part])
    reads, marks, some, chosen = parts.reads[part], parts.marks[part], parts.some[part], parts.chosen[part]
    length, first, begin = budget.length[sequence], budget.first[sequence], budget.begin[sequence]
    running.best[:], running.mass[:] = NONE, np.float32(0.0)
    running.rows[:], running.words[:] = np.float32(0.0), np.float32(0.0)
    others.mass[:], others.words[:], others.pages[:] = np.float32(0.0), np.float32(0.0), np.float32(0.0)
    end, many = min(stop, length), 0
    for at in range(start, end + BLOCK, BLOCK):
        count = min(BLOCK, end - at)
        if count > 0:
            estimate(scored, at, np.int64(1), count, settings.bits, settings.offset, settings.cap, shared, work)
        if many:  # of the block before: their keys and values have come near meanwhile
            attend(
                rows, settings.kind, chosen, many, marks, shared.turned, shared.by_word, settings.cap, running,
                parts.exact[part], parts.lines[part],
            )  # fmt: skip
        if count <= 0:
            break
        mark_read(
            work.logits, at, count, first, begin, shared.base, shared.threshold, settings.mode, parts.score[part], reads
        )
        some[:] = 0
        for mark in range(len(reads)):
            to = read[mark, at : at + count]
            for token in range(count):
                to[token] = reads[mark, token]
                some[token] |= reads[mark, token]
        many = 0
        for token in range(count):
            if some[token]:
                approach(rows, at + token)
                chosen[many] = at + token
                for mark in range(len(reads)):
                    marks[mark, many] = reads[mark, token]
                many += 1
        if settings.residual:
            take_others(
                work.logits, at, count, length, reads, scored.codewords, tokens.correction[head, sequence],
                tokens.correction_scale[head, sequence], others,
            )  # fmt: skip
    for mark in range(len(read)):
        for token in range(max(start, length), min(stop, read.shape[1])):
            read[mark, token] = 0


@compiled()
def take_others(weights, at, count, length, reads, codewords, correction, correction_scale, others):
    """Let the block's tokens that are not read count by their estimated weights [G or more, BLOCK], codeword by
    codeword; and the corrections of full pages, page by page."""
    for row in range(len(others.mass)):
        line, marks, total = weights[row], reads[min(row, len(reads) - 1)], np.float32(0.0)
        for token in range(count):
            weight = line[token] if marks[token] == 0 else np.float32(0.0)
            line[token] = weight
            total += weight
        line[count:] = np.float32(0.0)
        others.mass[row] += total
    held = codewords[at : at + count]
    for row in range(0, len(weights), LANES):
        a, b, c, d = weights[row], weights[row + 1], weights[row + 2], weights[row + 3]
        for token in range(count):
            word = held[token]
            others.words[word, row] += a[token]
            others.words[word, row + 1] += b[token]
            others.words[word, row + 2] += c[token]
            others.words[word, row + 3] += d[token]
    for page in range(at // PAGE, min((at + BLOCK) // PAGE, length // PAGE, len(correction))):
        scale, begin = of_half(np.int32(correction_scale[page])), page * PAGE - at
        for row in range(len(others.mass)):
            weight = np.float32(0.0)
            for token in range(begin, begin + PAGE):
                weight += weights[row, token]
            weight *= scale
            for dim in range(others.pages.shape[1]):
                others.pages[row, dim] += weight * (np.float32(correction[page, dim]) - CODES_OFFSET)


@compiled()
def finish(parts, first, ranges, base, tables, settings, head, sink_logits, out):
    """out [G, Dv], from the partial results of a unit, parts `first` to first + ranges."""
    for row in range(out.shape[0]):
        most = sink_logits[row]
        for part in range(first, first + ranges):
            most = max(most, parts.best[part, row])
            if parts.other_mass[part, row] > 0:
                most = max(most, base[row])
        total, other = share(sink_logits[row], most), share(base[row], most)
        out[row] = np.float32(0.0)
        # What is joined is put into the first part.
        joined, words = parts.rows[first, row], parts.words[first]
        for part in range(first, first + ranges):
            exact = share(parts.best[part, row], most)
            total += exact * parts.mass[part, row] + other * parts.other_mass[part, row]
            for dim in range(len(joined)):
                joined[dim] = exact * parts.rows[part, row, dim] + (joined[dim] if part > first else np.float32(0.0))
                out[row, dim] += other * parts.pages[part, row, dim]
            for word in range(len(words)):
                weight = other * parts.words[part, word, row]
                if settings.kind == CODES:
                    weight += exact * parts.exact_words[part, word, row]
                words[word, row] = weight + (words[word, row] if part > first else np.float32(0.0))
        for place in range(len(joined)):
            if settings.kind == CODES:
                for dim in range(len(joined)):
                    out[row, dim] += joined[place] * tables.turn_value[place, dim]
            else:
                out[row, place] += joined[place]
        if total > 0:
            for dim in range(len(joined)):
                out[row, dim] /= total
            for word in range(len(words)):
                words[word, row] /= total
    add_values(parts.words[first], tables.values[head], out)


@compiled()
def add_values(weights, values, out):
    """out [G, Dv] += weights [C, G or more] of values [C, Dv]."""
    for word in range(len(values)):
        for row in range(len(out)):
            weight = weights[word, row]
            for dim in range(out.shape[1]):
                out[row, dim] += weight * float_in(values, word, dim)
