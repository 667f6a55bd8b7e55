"""What methods lose when the model decodes with them: perplexity, and answers to questions. Float32 on a CPU.

Bytes are those of 16-bit caches: the stores count them on the same settings and lengths in `attention`, since a float32
cache would make low-bit codes look cheaper than they are.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvcal.artifacts import Artifact, weights_sha256
from kvcal.calibrate import open_data
from kvcal.calibrate.evaluation.grid import FULL
from kvcal.calibrate.evaluation.prompts import Prompts, make_prompts
from kvcal.calibrate.evaluation.protocol import evaluate
from kvcal.calibrate.evaluation.results import Results
from kvcal.calibrate.evaluation.results_file import read_current
from kvcal.calibrate.evaluation.tasks import ruler_package
from kvcal.calibrate.models import max_context
from kvcal.runtime.methods import METHODS

from .settings import AIMS, BY_ANSWERS, LEVELS, PAPERS, PUBLISHED, QUESTIONS, SEES_QUESTION, WHY_LOKI, at_equal_bytes
from .settings import aims as settings_of_aims
from .subjects import UNSEEN, Bench, name_of, uncentred

Setting = dict[str, Any]
CONTINUATION = 64
CALIBRATED = ("loki", "spectral")
"""The methods that decode with what was fitted."""
RULER_LEVEL = "1/8"
RULER_TASKS = ("multikey", *(task for task in ruler_package.NAMES if task != "qa_2"))
"""What fits into 2048 tokens; qa_2 takes more."""
SAMPLES = 8
"""Of each of these."""
AIMED_AT = ("passkey", "niah_single_2")
AIMED_SAMPLES = {4096: 16, 7680: 8}
"""Of each of these, by tokens of the context."""
ANSWERABLE = 0.5
"""RULER's tasks of which the model itself answers fewer say nothing about methods."""


def methods(bench: Bench, only: str | None = None) -> None:
    """Every method at equal bytes, at every length: perplexity and passkey."""
    for length, levels in bench.subject.lengths.items():
        grid = _grid(bench, levels, length, only)
        prompts = _on_text(bench, length, ("perplexity", "passkey"))
        decode(bench, f"methods-{length}", prompts, grid, bench.artifact())


def short_blocks(bench: Bench, only: str | None = None) -> None:
    """The calibrated methods at equal bytes, calibrated in short blocks."""
    for length, levels in bench.subject.lengths.items():
        grid = [setting for setting in _grid(bench, levels, length, only) if setting["method"] in CALIBRATED]
        if grid:
            prompts = _on_text(bench, length, ("perplexity", "passkey"))
            decode(bench, f"short-blocks-{length}", prompts, grid, bench.in_short_blocks())


def defaults(bench: Bench, only: str | None = None) -> None:
    """Every method as it decodes when nothing is said; rows name the defaults that they were measured with. What of an
    artifact `xcla` needs has settings of its own, and a part (`xcla.py`)."""
    grid = [
        {"method": name, **dataclasses.asdict(method())}
        for name, method in METHODS.items()
        if name not in ("full", "xcla") and only in (None, name)
    ]
    decode(bench, "defaults", text_and_passkey(bench), grid, bench.artifact())


def papers(bench: Bench, only: str | None = None) -> None:
    """Every method with its paper's settings."""
    grid = [setting for setting in PAPERS if only in (None, setting["method"])]
    decode(bench, "papers", text_and_passkey(bench), grid, bench.artifact())


def by_answers(bench: Bench, only: str | None = None) -> None:
    """What attention errors mislead about, by what the model then answers."""
    grid = [setting for setting in BY_ANSWERS if only in (None, setting["method"])]
    decode(bench, "by-answers", text_and_passkey(bench), grid, bench.artifact())


def why_loki(bench: Bench, only: str | None = None) -> None:
    """What of Loki's loss is its choice, its rank, its basis, the first layer or the sinks."""
    grid = [setting for setting in WHY_LOKI.values() if only in (None, setting["method"])]
    prompts = text_and_passkey(bench)
    decode(bench, "why-loki", prompts, grid, bench.in_short_blocks())
    decode(bench, "why-loki-uncentred", prompts, [PUBLISHED], uncentred(bench.in_short_blocks()))


def questions(bench: Bench, only: str | None = None) -> None:
    """What a calibration on questions changes."""
    grid = [setting for setting in QUESTIONS if only in (None, setting["method"])]
    artifact = bench.in_short_blocks("questions", source=bench.questions())
    decode(bench, "questions", text_and_passkey(bench), grid, artifact)


def question_seen(bench: Bench, only: str | None = None) -> None:
    """Passkey with the question in the prompt: SnapKV is made for that."""
    grid = [setting for setting in SEES_QUESTION if only in (None, setting["method"])]
    prompts = _on_text(bench, bench.subject.shortest, ("passkey",))
    decode(bench, "question-seen", prompts, grid, bench.artifact(), question="prefilled")


def aims(bench: Bench, only: str | None = None) -> None:
    """`spectral` where it is to lose nothing: more questions, also of a task of which the model answers most."""
    for length in AIMS:
        prompts = _on_text(bench, length, ("perplexity", *AIMED_AT), AIMED_SAMPLES[length])
        decode(bench, f"aims-{length}", prompts, settings_of_aims(length, bench.subject.head_dim), bench.artifact())


def ruler(bench: Bench, only: str | None = None) -> None:
    """RULER's tasks and multikey: what the model itself answers of all; of those that it can, what methods do at an
    eighth."""
    length = bench.subject.shortest
    of_all = _on_text(bench, length, RULER_TASKS, SAMPLES)
    row = decode(bench, f"ruler-full-{length}", of_all, [], None)[0]
    known = [key.partition("@")[0] for key, score in row["scores"].items() if score >= ANSWERABLE]
    grid = _grid(bench, [RULER_LEVEL], length, only)
    if known:
        decode(bench, f"ruler-{length}", _on_text(bench, length, known, SAMPLES), grid, bench.artifact())


def _grid(bench: Bench, levels: Sequence[str], length: int, only: str | None) -> list[Setting]:
    return [
        setting
        for level in levels
        for setting in at_equal_bytes(LEVELS[level], bench.subject.head_dim, length)
        if only in (None, setting["method"])
    ]


def text_and_passkey(bench: Bench) -> Prompts:
    """What a part decodes that needs no length of its own."""
    return _on_text(bench, bench.subject.shortest, ("perplexity", "passkey"))


def whole(bench: Bench) -> str:
    """The part that has measured `full` on the same prompts."""
    return f"methods-{bench.subject.shortest}"


def text_of(bench: Bench) -> Prompts:
    """The same without questions."""
    return _on_text(bench, bench.subject.shortest, ("perplexity",))


def _on_text(bench: Bench, length: int, tasks: Sequence[str], samples: int | None = None) -> Prompts:
    return make_prompts(
        open_data(list(UNSEEN["both"])),
        bench.loaded.tokenizer,
        prefix=length,
        continuation=CONTINUATION,
        windows=8 if length < 7680 else 4,
        tasks=tasks,
        episodes=samples or (20 if length < 4096 else 8 if length < 16384 else 4),
        name="unseen text",
        most_tokens=max_context(bench.loaded.model.config),
    )


def decode(
    bench: Bench,
    part: str,
    prompts: Prompts,
    grid: Sequence[Setting],
    artifact: Artifact | None,
    question: str = "decoded",
    full_of: str | None = None,
) -> list[dict[str, Any]]:
    """What `calibrate evaluate` does; settings that were measured already are not measured again.

    Args:
        full_of: a part whose row of `full` will do, where it was measured on the same prompts.
    """
    model = bench.loaded.model
    settings = {
        "model": bench.subject.model,
        "weights_sha256": weights_sha256(model),
        "calibrated_on": artifact and name_of(artifact),
        "tokens_sha256": prompts.tokens_sha256,
        "dtype": "float32",
        "batch_size": 8,
        "data": prompts.source,
    }
    if question != "decoded":
        settings["question"] = question
    results = Results.open(settings, bench.path(part))
    if full_of and results.row(FULL) is None:
        results.rows += _full_row(bench.path(full_of), settings)
    return evaluate(
        model,
        artifact,
        prompts,
        grid,
        tokenizer=bench.loaded.tokenizer,
        question=question,
        results=results,
        say=lambda line: print(f"{part}: {line}", flush=True),
    )


def _full_row(path: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The row of `full`, which no artifact has a part in; [] where it was measured on anything else."""
    if not path.exists():
        return []
    body = read_current(path)
    whatever = {"calibrated_on": None}
    if json.loads(json.dumps(settings)) | whatever != body["settings"] | whatever:
        return []
    return [row for row in body["results"] if row["method"] == FULL["method"]]


def forget(path: Path, method: str) -> None:
    """Drop what was measured of a method, so that it is measured again."""
    body = json.loads(path.read_text())
    if "results" in body:
        body["results"] = [row for row in body["results"] if row["method"] != method]
        body["partial"] = {key: found for key, found in body.get("partial", {}).items() if f'"{method}"' not in key}
    else:  # of `attention`: by level and setting
        body = {key: found for key, found in body.items() if f'"method": "{method}"' not in key}
    path.write_text(json.dumps(body, indent=1) + "\n")
