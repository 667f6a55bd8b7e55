"""The parts of the page for which the model decodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvcal.calibrate.evaluation.results import parameters

from ..shared.lookup import read
from ..shared.tables import named, number, table, with_error
from .decoding import CONTINUATION
from .settings import WHY_LOKI
from .subjects import Subject

Row = Mapping[str, Any]


def methods(folder: Path, subject: Subject) -> str:
    """Perplexity over full's and answers at equal bytes, by length. read: bytes of a 16-bit cache, counted by the
    stores in the part on attention errors, except for h2o, whose tokens have 8 bytes besides, and snapkv, which also
    reads what was decoded."""
    return _by_length(folder, subject, "methods")


def short_blocks(folder: Path, subject: Subject) -> str:
    """What uses a calibration, calibrated in blocks of 2048 tokens; above, in blocks of 8192."""
    return _by_length(folder, subject, "short-blocks")


def bytes_of(folder: Path, subject: Subject, length: int) -> Callable[[Row], float | None]:
    """Of a row: bytes of a 16-bit cache that its setting reads, over those of all; None: not measured."""
    found = read(folder / f"{subject.model}-attention-{length}.json")
    measured = {key_of(entry["setting"]): entry["bytes"] for entries in found.values() for entry in entries}

    def share(row: Row) -> float | None:
        if row["method"] == "full":
            return 1.0
        if row["method"] == "h2o":
            return float(row["keep"]) * (1 + 8 / (4 * subject.head_dim))
        if row["method"] == "snapkv":
            decoded = CONTINUATION / 2
            return (float(row["keep"]) * length + decoded) / (length + decoded)
        return measured.get(key_of(row))

    return share


def papers(folder: Path, subject: Subject) -> str:
    """With the settings of the papers; spectral, which has none, with its defaults. read: of a float32 cache,
    layers with a sliding window included."""
    return _of_part(folder, subject, "papers")


def defaults(folder: Path, subject: Subject) -> str:
    """With no settings at all; named are the defaults that each had when it was measured. read: of a float32 cache,
    layers with a sliding window included."""
    rows = read(folder / f"{subject.model}-defaults.json").get("results", [])
    return _table(rows, _of_this_run(rows), [f"`{row['method']}`" for row in rows]) if rows else ""


def why_loki(folder: Path, subject: Subject) -> str:
    """Loki at rank and keep of a quarter, and one change each. read: of a float32 cache, layers with a sliding window
    included; each query head reads tokens of its own where the group does not choose."""
    names = {key_of({"method": "full"}): "full", **{key_of(setting): name for name, setting in WHY_LOKI.items()}}
    measured = read(folder / f"{subject.model}-why-loki.json").get("results", [])
    rows = [row for row in measured if key_of(row) in names]
    return _table(rows, _of_this_run(rows), [names[key_of(row)] for row in rows]) if rows else ""


def by_answers(folder: Path, subject: Subject) -> str:
    """Choices that attention errors mislead about. read: of a float32 cache."""
    return _of_part(folder, subject, "by-answers")


def uncentred(folder: Path, subject: Subject) -> str:
    """Loki as published, with PCA of keys from which no mean was subtracted."""
    return _of_part(folder, subject, "why-loki-uncentred")


def subgen(folder: Path, subject: Subject) -> str:
    """SubGen in a fifth of the memory, otherwise divided between window and samples, beside a window alone. read: of a
    float32 cache."""
    return _of_part(folder, subject, f"subgen-{subject.shortest}")


def questions(folder: Path, subject: Subject) -> str:
    """Calibrated on text in which facts are asked and answered."""
    return _of_part(folder, subject, "questions")


def question_seen(folder: Path, subject: Subject) -> str:
    """Passkey with the question in the prompt. SnapKV then chooses by the question; H2O's attention sums end before it;
    with spectral the first token of an answer is the dense prefill's."""
    return _scores(folder, f"{subject.model}-question-seen.json")


def ruler_full(folder: Path, subject: Subject) -> str:
    """What the model itself answers of RULER's tasks."""
    return _scores(folder, f"{subject.model}-ruler-full-*.json")


def ruler(folder: Path, subject: Subject) -> str:
    """What methods answer at an eighth of the bytes, of the tasks of which the model itself answers half or more."""
    return _scores(folder, f"{subject.model}-ruler-[0-9]*.json")


def aims(folder: Path, subject: Subject) -> str:
    """Sixteen questions of each task, after 7680 tokens eight. read: as above."""
    return _by_length(folder, subject, "aims")


def plans(folder: Path, subject: Subject) -> str:
    """A plan of `calibrate plan`, beside the same budget divided among layers by weighted and by plain losses, and
    beside each code of its grid in all layers, with `keep` such that it reads as many bytes as the plan. On 12 windows
    that no plan has seen, 32 decoded tokens each. read: as predicted, of a float32 cache; divergence: of next tokens
    from the whole cache's, in nats; less: by how much the plan's is smaller, paired; lost: log-likelihood, in nats a
    token."""
    parts = []
    for length, by_budget in read(folder / f"{subject.model}-plans.json").items():
        for budget, found in by_budget.items():
            rows = [
                [
                    row["what"],
                    number(row["bytes"], ".4f"),
                    *(with_error(row[name], row[f"{name}_se"], ".5f") for name in ("divergence", "less", "nll")),
                ]
                for row in found["rows"]
            ]
            compared = table(["", "read", "divergence", "less", "lost"], rows)
            parts.append(f"### {budget} of the bytes, {length} tokens\n\n{compared}\n\n{_check(found['checked'])}")
    return "\n\n".join(parts)


def row_of(path: Path, setting: Row) -> Row | None:
    """A row of results with a setting; None: not measured."""
    rows = read(path).get("results", [])
    return next((row for row in rows if parameters(row) == setting), None)


def _check(checked: Mapping[str, Any]) -> str:
    plan, full = checked["plan"], checked["full"]
    found = [f"perplexity / full {with_error(plan['perplexity_ratio'], plan['perplexity_ratio_se'])}"]
    for task, score in full["scores"].items():
        own = f"{plan['scores'][task]:.2f}" if task in plan["scores"] else "not asked"
        found.append(f"{task} {own} (full {score:.2f})")
    return f"The plan's own check: {', '.join(found)}."


def _by_length(folder: Path, subject: Subject, part: str) -> str:
    """A table for each length, by rising bytes."""
    parts = []
    for length in subject.lengths:
        rows = read(folder / f"{subject.model}-{part}-{length}.json").get("results", [])
        if rows:
            shares = bytes_of(folder, subject, length)
            ordered = sorted(rows, key=lambda row: shares(row) or row.get("keep", 1.0))
            parts.append(f"### {length} tokens\n\n{_table(ordered, shares)}")
    return "\n\n".join(parts)


def _of_part(folder: Path, subject: Subject, part: str) -> str:
    rows = read(folder / f"{subject.model}-{part}.json").get("results", [])
    return _table(rows, _of_this_run(rows)) if rows else ""


def _scores(folder: Path, pattern: str) -> str:
    parts = []
    for path in sorted(folder.glob(pattern)):
        rows = read(path)["results"]
        if rows:
            tasks = list(rows[0]["scores"])
            lines = [
                [
                    named(parameters(row)),
                    *(with_error(row["scores"][task], row["scores_se"][task], ".2f") for task in tasks),
                ]
                for row in rows
            ]
            parts.append(table(["method", *tasks], lines))
    return "\n\n".join(parts)


def _table(rows: Sequence[Row], share: Callable[[Row], float | None], names: Sequence[str] | None = None) -> str:
    tasks = list(rows[0]["scores"])
    lines = [
        [
            *([names[at]] if names else []),
            named(parameters(row)),
            number(share(row), ".4f"),
            with_error(row["perplexity_ratio"], row["perplexity_ratio_se"]),
            *(with_error(row["scores"][task], row["scores_se"][task], ".2f") for task in tasks),
        ]
        for at, row in enumerate(rows)
    ]
    return table([*(["what"] if names else []), "method", "read", "perplexity / full", *tasks], lines)


def _of_this_run(rows: Sequence[Row]) -> Callable[[Row], float | None]:
    return lambda row: row["bytes_per_step"] / rows[0]["bytes_per_step"]


def key_of(setting: Row) -> str:
    return repr(sorted((name, repr(value)) for name, value in parameters(setting).items()))
