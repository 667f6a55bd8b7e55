"""The parts of the page about layers that share keys and values, decoded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvcal.calibrate.evaluation.results_file import parameters
from kvcal.calibrate.evaluation.standard_errors import Estimate, mean

from ..shared.lookup import read
from ..shared.tables import named, number, scores_of, table, with_error
from .page_decoding import row_of
from .sharing import FITTED, MEAN, PATTERNS
from .subjects import Subject
from .xcla import ALL, CHOSEN, CODES

Row = Mapping[str, Any]


def trained(folder: Path, subject: Subject) -> list[tuple[int, Row]]:
    """(tokens trained on, row), of what was measured."""
    paths = folder.glob(_trained_path(folder, subject, "*").name)
    tokens = sorted(int(path.stem.rpartition("-")[2]) for path in paths)
    rows = ((each, row_of(_trained_path(folder, subject, each), FITTED)) for each in tokens)
    return [(each, row) for each, row in rows if row]


def _trained_path(folder: Path, subject: Subject, tokens: int | str) -> Path:
    return folder / f"{subject.model}-uptraining-{tokens}.json"


def uptraining(folder: Path, subject: Subject) -> str:
    """Cross-layer attention in the pattern keep-ends, from projections fitted to 32768 tokens in blocks of 512, by
    tokens trained on: `--train attention --lr 3e-4 --batch-size 2 --block-size 512`, on the divergence from the
    original's predictions. Every row is the end of a schedule of its own, and the start of the next. lost: nats a
    token; slope: the exponent of tokens by which that falls between two rows, paired by window."""
    rows = trained(folder, subject)
    lines, before = [], None
    for tokens, row in rows:
        full = row_of(_trained_path(folder, subject, tokens), {"method": "full"})
        assert full is not None, "an evaluation begins with it"
        lost = [own - whole for own, whole in zip(row["window_nll"], full["window_nll"], strict=True)]
        lines.append(
            [
                str(tokens),
                with_error(row["perplexity_ratio"], row["perplexity_ratio_se"]),
                with_error(*mean(lost)),
                with_error(*exponent(before, (tokens, lost)), ".2f"),
                *scores_of(row),
            ]
        )
        before = tokens, lost
    tasks = rows[0][1]["scores"] if rows else ()
    return table(["tokens", "perplexity / full", "lost", "slope", *tasks], lines) if lines else ""


Trained = tuple[int, Sequence[float]]
"""Tokens, and what is lost in each window."""


def exponent(before: Trained | None, after: Trained) -> Estimate:
    """s of lost ∝ tokens^s between two trainings, and by the delta method its error, windows paired; None where nothing
    is lost."""
    if before is None:
        return None, None
    first, last = (sum(lost) / len(lost) for _, lost in (before, after))
    if min(first, last) <= 0:
        return None, None
    times = math.log(after[0] / before[0])
    _, error = mean([b / last - a / first for a, b in zip(before[1], after[1], strict=True)])
    return math.log(last / first) / times, None if error is None else error / times


def sharing(folder: Path, subject: Subject) -> str:
    """Cross-layer attention before any training, in groups of two layers or storing as many layers as those: perplexity
    over the original's, and answers. fitted: shared projections in closed form, to 32768 tokens of the calibration text
    in blocks of 2048; mean: of the layers' projections. resident: bytes held, over those of all layers."""
    lines = []
    tasks: list[str] = []
    for pattern in PATTERNS:
        path = folder / f"{subject.model}-sharing-{pattern}.json"
        full = row_of(path, {"method": "full"})
        mean = row_of(path, MEAN) or row_of(folder / f"{subject.model}-mean-{pattern}.json", MEAN)
        for start, row, form in (("fitted", row_of(path, FITTED), ".3f"), ("mean", mean, ".0f")):
            if full and row:
                tasks = list(full["scores"])
                held = number(row["resident_bytes"] / full["resident_bytes"]) if row["scores"] else "the same"
                ratio = with_error(row["perplexity_ratio"], row["perplexity_ratio_se"], form)
                lines.append([pattern, held, start, ratio, *(scores_of(row) or ["–"] * len(tasks))])
    return table(["pattern", "resident", "start", "perplexity / full", *tasks], lines) if lines else ""


def xcla(folder: Path, subject: Subject) -> str:
    """`xcla`: coefficients of 8, 4, 2 or 0 bits that a group of layers has in common, the last 16 tokens as they came;
    groups of 1: each layer by itself. memory: of codes, as it was asked for; resident and read: of all that is held,
    and read, over those of a 16-bit cache, the last rows counted in float32, in which it was decoded. spectral chooses
    tokens by its own codes and restores those. paired: nats a token more than each layer by itself in as much
    memory."""
    lines, tasks = [], []
    for group, memory in CODES:
        path = folder / f"{subject.model}-xcla-{group}-{memory}.json"
        alone = row_of(folder / f"{subject.model}-xcla-1-{memory}.json", ALL)
        full = row_of(path, {"method": "full"})
        if full is None:
            continue
        assert read(path)["settings"]["dtype"] == "float32", "rows of `full` are counted half"
        for setting in (ALL, CHOSEN):
            row = row_of(path, setting)
            if row is None:
                continue
            tasks = list(full["scores"])
            compared = group > 1 and alone is not None and setting is ALL
            paired = with_error(*_more(row, alone)) if compared else ""
            lines.append(
                [
                    named(parameters(row)),
                    str(group),
                    str(memory),
                    number(2 * row["resident_bytes"] / full["resident_bytes"]),
                    number(2 * row["bytes_per_step"] / full["bytes_per_step"]),
                    with_error(row["perplexity_ratio"], row["perplexity_ratio_se"]),
                    paired,
                    *scores_of(row),
                ]
            )
    header = ["method", "layers", "memory", "resident", "read", "perplexity / full", "paired", *tasks]
    return table(header, lines) if lines else ""


def _more(row: Row, other: Row) -> Estimate:
    """By how many nats a token `row` loses more than `other`, windows paired."""
    return mean([own - its for own, its in zip(row["window_nll"], other["window_nll"], strict=True)])
