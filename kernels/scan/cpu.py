"""The scan on a CPU, in numba: threads over sequences, heads and ranges of tokens.

A unit is a (head, sequence); a part is a range of a unit's tokens. What is kept are lists of rows (`cpu.pages`). Logits
are in units of log 2.
"""

from __future__ import annotations

from collections import namedtuple

import numpy as np
from numba import prange

from ..cpu import compiled
from ..cpu.arithmetic import NONE, float_in, of_half, share
from ..cpu.pages import row, spans_in
from ..cpu.rows import CODES, CODES_OFFSET, Rows, Running, approach, attend
from ..pages import PAGE
from .cpu_choice import mark_read, thresholds
from .cpu_codes import BLOCK, LANES, Query, Scored, Scratch, dimension, estimate

Tokens = namedtuple(
    "Tokens", "codes scales codewords key value key_scale value_scale correction correction_scale steps of_rows"
)
"""Lists of rows, [9, 3] int64 the steps of each, and [5, 3] those of `Rows`."""
CODE, SCALE, WORD, KEY, VALUE, KEY_SCALE, VALUE_SCALE, CORRECTION, CORRECTION_SCALE = range(9)
"""Which of the steps are whose."""
OF_ROWS = (KEY, VALUE, KEY_SCALE, VALUE_SCALE, WORD)
"""Those of `Rows`, in its order."""
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
    "best mass rows exact_words other_mass words pages codes numbers spread codewords logits score exact reads marks "
    "some chosen_page chosen_offset spans lines",
)
"""`Running` and `Others` of every part, and what is at work in one."""


@compiled(parallel=True)
def scan(query, tokens, table, tables, budget, settings, sink_logits, units, parts, ranges, per_range, read, out):
    """Phase 0 prepares units, phase 1 takes parts, phase 2 joins them: one loop, because each takes long to compile.

    Args:
        query: [B, Hkv, G, D] float32.
        table: see `cpu.pages`; pages of a multiple of 64 tokens, or one for each sequence.
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
                    query[sequence, head], tokens, table, tables, budget, settings, head, sequence, units, unit, parts,
                    ranges,
                )  # fmt: skip
            elif phase == 1:
                start = at % ranges * per_range
                scan_range(
                    tokens, table, budget, settings, head, sequence, units, unit, parts, at, start, start + per_range,
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
    return Scratch(
        parts.codes[part], parts.numbers[part], parts.spread[part], parts.codewords[part], parts.logits[part]
    )


@compiled()
def scored_of(tokens):
    return Scored(tokens.codes, tokens.scales, tokens.codewords, tokens.steps)


@compiled()
def prepare(query, tokens, table, tables, budget, settings, head, sequence, units, unit, parts, ranges):
    """What a unit's parts share: queries [G, D] in the bases of codes and of rows, and thresholds."""
    scored, shared, work = scored_of(tokens), shared_of(units, unit), scratch_of(parts, unit * ranges)
    spans = spans_in(parts.spans[unit * ranges])
    logits, rank, line = units.logits[unit], tables.query_map.shape[2], parts.lines[unit * ranges, 0]
    for number in range(len(query)):
        project(query[number], tables.query_map[head], settings.factor, line)
        shared.sums[number] = np.float32(0.0)
        for place in range(rank):
            shared.projected[number, place] = line[dimension(place, rank, settings.bits)]
            shared.sums[number] += shared.projected[number, place]
        if settings.kind == CODES:
            project(query[number], tables.turn_key.T, settings.factor, shared.turned[number])
        else:
            for dim in range(query.shape[1]):
                shared.turned[number, dim] = query[number, dim] * settings.factor
    logits_of_codewords(query, tables.keys[head], settings.factor, shared.by_word)
    first, begin, stride = budget.first[sequence], budget.begin[sequence], budget.stride[sequence]
    at, sampled = -(-first // stride) * stride, 0
    while at < begin:
        count = min(BLOCK, -(-(begin - at) // stride))
        estimate(
            scored, table, sequence, head, at, stride, count, spans, settings.bits, settings.offset, settings.cap,
            shared, work,
        )  # fmt: skip
        for number in range(len(query)):
            for token in range(count):
                logits[number, sampled + token] = work.logits[number, token]
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
        for lane in range(0, out.shape[1], LANES):
            a, b, c, d = np.float32(0.0), np.float32(0.0), np.float32(0.0), np.float32(0.0)
            for dim in range(query.shape[1]):
                number = float_in(keys, word, dim)
                a += query[min(lane, last), dim] * number
                b += query[min(lane + 1, last), dim] * number
                c += query[min(lane + 2, last), dim] * number
                d += query[min(lane + 3, last), dim] * number
            out[word, lane], out[word, lane + 1] = a * factor, b * factor
            out[word, lane + 2], out[word, lane + 3] = c * factor, d * factor


@compiled()
def scan_range(tokens, table, budget, settings, head, sequence, units, unit, parts, part, start, stop, read):
    """Tokens from `start` to `stop` of one unit: exactly what is read, and the others by their estimates."""
    scored, shared, work = scored_of(tokens), shared_of(units, unit), scratch_of(parts, part)
    rows = Rows(
        tokens.key, tokens.value, tokens.key_scale, tokens.value_scale, tokens.codewords, tokens.of_rows
    )  # fmt: skip
    running = Running(parts.best[part], parts.mass[part], parts.rows[part], parts.exact_words[part])
    others = Others(parts.other_mass[part], parts.words[part], parts.pages[part])
    reads, marks, some, spans = parts.reads[part], parts.marks[part], parts.some[part], spans_in(parts.spans[part])
    pages, offsets = parts.chosen_page[part], parts.chosen_offset[part]
    length, first, begin = budget.length[sequence], budget.first[sequence], budget.begin[sequence]
    running.best[:], running.mass[:] = NONE, np.float32(0.0)
    running.rows[:], running.words[:] = np.float32(0.0), np.float32(0.0)
    others.mass[:], others.words[:], others.pages[:] = np.float32(0.0), np.float32(0.0), np.float32(0.0)
    end, many = min(stop, length), 0
    for at in range(start, end + BLOCK, BLOCK):
        count = min(BLOCK, end - at)
        if count > 0:
            estimate(
                scored, table, sequence, head, at, np.int64(1), count, spans, settings.bits, settings.offset,
                settings.cap, shared, work,
            )  # fmt: skip
        if many:  # of the block before: their keys and values have come near meanwhile
            attend(
                rows, settings.kind, head, pages, offsets, many, marks, shared.turned, shared.by_word, settings.cap,
                running, parts.exact[part], parts.lines[part],
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
        many, span = 0, 0
        for token in range(count):
            if token >= spans.begin[span] + spans.count[span]:
                span += 1
            if some[token]:
                page, offset = spans.page[span], spans.offset[span] + token - spans.begin[span]
                approach(rows, page, head, offset)
                pages[many], offsets[many] = page, offset
                for mark in range(len(reads)):
                    marks[mark, many] = reads[mark, token]
                many += 1
        if settings.residual:
            take_others(work.logits, at, count, length, reads, work.codewords, tokens, table, sequence, head, others)
    for mark in range(len(read)):
        for token in range(max(start, length), min(stop, read.shape[1])):
            read[mark, token] = 0


@compiled()
def take_others(weights, at, count, length, reads, codewords, tokens, table, sequence, head, others):
    """Let the block's tokens that are not read count by their estimated weights [G or more, BLOCK], codeword by
    codeword; and the corrections of full pages, page by page."""
    for query in range(len(others.mass)):
        line, marks, total = weights[query], reads[min(query, len(reads) - 1)], np.float32(0.0)
        for token in range(count):
            weight = line[token] if marks[token] == 0 else np.float32(0.0)
            line[token] = weight
            total += weight
        line[count:] = np.float32(0.0)
        others.mass[query] += total
    for lane in range(0, len(weights), LANES):
        a, b, c, d = weights[lane], weights[lane + 1], weights[lane + 2], weights[lane + 3]
        for token in range(count):
            word = codewords[token]
            others.words[word, lane] += a[token]
            others.words[word, lane + 1] += b[token]
            others.words[word, lane + 2] += c[token]
            others.words[word, lane + 3] += d[token]
    if len(tokens.correction) == 0:
        return
    for number in range(at // PAGE, min((at + BLOCK) // PAGE, length // PAGE)):
        begin = number * PAGE - at
        page, place = table.pages[sequence, number * PAGE // table.size], number * PAGE % table.size // PAGE
        correction = tokens.correction[row(tokens.steps[CORRECTION], page, head, place)]
        scale = of_half(np.int32(tokens.correction_scale[row(tokens.steps[CORRECTION_SCALE], page, head, place)]))
        for query in range(len(others.mass)):
            weight = np.float32(0.0)
            for token in range(begin, begin + PAGE):
                weight += weights[query, token]
            weight *= scale
            for dim in range(others.pages.shape[1]):
                others.pages[query, dim] += weight * (np.float32(correction[dim]) - CODES_OFFSET)


@compiled()
def finish(parts, first, ranges, base, tables, settings, head, sink_logits, out):
    """out [G, Dv], from the partial results of a unit, parts `first` to first + ranges."""
    for query in range(out.shape[0]):
        most = sink_logits[query]
        for part in range(first, first + ranges):
            most = max(most, parts.best[part, query])
            if parts.other_mass[part, query] > 0:
                most = max(most, base[query])
        total, other = share(sink_logits[query], most), share(base[query], most)
        out[query] = np.float32(0.0)
        # What is joined is put into the first part.
        joined, words = parts.rows[first, query], parts.words[first]
        for part in range(first, first + ranges):
            exact = share(parts.best[part, query], most)
            total += exact * parts.mass[part, query] + other * parts.other_mass[part, query]
            for dim in range(len(joined)):
                joined[dim] = exact * parts.rows[part, query, dim] + (joined[dim] if part > first else np.float32(0.0))
                out[query, dim] += other * parts.pages[part, query, dim]
            for word in range(len(words)):
                weight = other * parts.words[part, word, query]
                if settings.kind == CODES:
                    weight += exact * parts.exact_words[part, word, query]
                words[word, query] = weight + (words[word, query] if part > first else np.float32(0.0))
        for place in range(len(joined)):
            if settings.kind == CODES:
                for dim in range(len(joined)):
                    out[query, dim] += joined[place] * tables.turn_value[place, dim]
            else:
                out[query, place] += joined[place]
        if total > 0:
            for dim in range(len(joined)):
                out[query, dim] /= total
            for word in range(len(words)):
                words[word, query] /= total
    add_values(parts.words[first], tables.values[head], out)


@compiled()
def add_values(weights, values, out):
    """out [G, Dv] += weights [C, G or more] of values [C, Dv]."""
    for word in range(len(values)):
        for query in range(len(out)):
            weight = weights[word, query]
            for dim in range(out.shape[1]):
                out[query, dim] += weight * float_in(values, word, dim)
