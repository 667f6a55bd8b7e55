"""What results files say: every setting's quality and bytes beside `full`'s, and the best within a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...artifacts import Artifact, KvcalError
from ..evaluation.figure import name_of, series_of, varied_settings
from ..evaluation.results_file import parameters, read
from ..evaluation.rows import low_scores, mean_score
from ..evaluation.seen_text import overlap
from ..plots import plain_name, short_name
from .numbers import number

BUDGETS = (0.25, 0.125)
ALLOWANCE = 1.1
"""A setting belongs to a budget that it exceeds by up to this factor: what it reads beside its tokens counts, too."""


@dataclass(frozen=True)
class Point:
    """One setting: what it costs and how it does."""

    method: str
    series: str
    """Its line in a figure: the method and the settings in which its lines differ."""
    settings: str
    """All of them, "rank 0.25, keep 0.125"."""
    read: float | None
    """Bytes per step, as a share of `full`'s; None: not measured."""
    held: float | None
    """Bytes of memory, as a share of `full`'s."""
    ratio: float | None
    """Perplexity over `full`'s."""
    ratio_se: float | None
    score: float | None
    """Mean of the tasks, 0 to 1."""
    score_se: float | None

    @property
    def label(self) -> str:
        return f"{self.method} ({self.settings})" if self.settings else self.method


@dataclass(frozen=True)
class Best:
    """The best settings within a budget, by perplexity and by answers."""

    budget: str
    by_ratio: Point | None
    by_score: Point | None


@dataclass(frozen=True)
class Evaluation:
    """One results file."""

    name: str
    """Of the file."""
    path: Path
    whose: str
    """"this artifact", "another artifact of this model" or "another model"."""
    model: str
    text: str
    context: str
    """What was decoded after: "1024 tokens of context"; "" where it is not stated."""
    points: tuple[Point, ...]
    """`full` first."""
    tasks: tuple[str, ...]
    best: tuple[Best, ...]
    warnings: tuple[str, ...]

    @property
    def ours(self) -> bool:
        """Whether it is of the report's model."""
        return self.whose != "another model"


def evaluation(artifact: Artifact, path: Path, name: str) -> Evaluation:
    """
    Args:
        name: of the file, on the page.

    Raises:
        KvcalError: not a results file, or one without `full`.
    """
    body = read(path)
    settings, rows = body["settings"], body["results"]
    full = next((row for row in rows if row["method"] == "full" and not row.get("source")), None)
    if full is None:
        raise KvcalError(f"{path}: has no row of `full` to compare with: let `calibrate evaluate` finish it first")
    varied = varied_settings(rows)
    points = tuple(_point(row, full, varied) for row in rows)
    prefix = settings.get("prefix")
    return Evaluation(
        name=name,
        path=path,
        whose=_whose(artifact, settings),
        model=short_name(plain_name(settings.get("model", "a model"))),
        text=short_name(plain_name(_source(settings).get("id", "text"))),
        context=f"{prefix} tokens of context" if isinstance(prefix, int) else "",
        points=points,
        tasks=tuple(full.get("scores") or ()),
        best=_best(points),
        warnings=tuple(_warnings(artifact, body, full, name)),
    )


def _point(row: Mapping[str, Any], full: Mapping[str, Any], varied: set[str]) -> Point:
    ratio = row.get("perplexity_ratio")
    if ratio is None and row.get("perplexity") and full.get("perplexity"):
        ratio = row["perplexity"] / full["perplexity"]
    score, score_se = mean_score({kind: _known(row, kind) for kind in ("scores", "scores_se")})
    stated = {name: value for name, value in parameters(row).items() if name != "method"}
    return Point(
        method=short_name(name_of(row)),
        series=short_name(series_of(row, varied)),
        settings=short_name(", ".join(f"{name} {value}" for name, value in stated.items()), 300),
        read=_share(row, full, "bytes_per_step"),
        held=_share(row, full, "resident_bytes"),
        ratio=number(ratio),
        ratio_se=number(row.get("perplexity_ratio_se")),
        score=number(score),
        score_se=number(score_se),
    )


def _known(row: Mapping[str, Any], kind: str) -> dict[str, float]:
    """Scores or their errors that are numbers."""
    return {task: found for task, value in (row.get(kind) or {}).items() if (found := number(value)) is not None}


def _share(row: Mapping[str, Any], full: Mapping[str, Any], cost: str) -> float | None:
    mine, fulls = number(row.get(cost)), number(full.get(cost))
    return mine / fulls if mine and fulls and mine > 0 and fulls > 0 else None


def _best(points: Sequence[Point]) -> tuple[Best, ...]:
    costs: dict[str, Callable[[Point], float | None]] = {
        "read": lambda point: point.read,
        "held": lambda point: point.held,
    }
    found = []
    for verb, cost in costs.items():
        for budget in BUDGETS:
            fit = [point for point in points if (share := cost(point)) is not None and share <= ALLOWANCE * budget]
            # Below 1 a ratio is chance: among those that lose nothing the one of fewest bytes is best.
            by_ratio = min(
                (p for p in fit if p.ratio is not None),
                key=lambda p: (max(p.ratio or 0.0, 1.0), cost(p) or 0.0),
                default=None,
            )
            by_score = max((p for p in fit if p.score is not None), key=lambda p: p.score or 0.0, default=None)
            found.append(Best(f"1/{round(1 / budget)} of the bytes {verb}", by_ratio, by_score))
    return tuple(each for each in found if each.by_ratio or each.by_score)


def _source(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    source = settings.get("data")
    return source if isinstance(source, Mapping) else {}


def _whose(artifact: Artifact, settings: Mapping[str, Any]) -> str:
    if artifact.content_hash is not None and settings.get("artifact") == artifact.content_hash:
        return "this artifact"
    same = settings.get("weights_sha256") == artifact.model.weights_sha256
    return "another artifact of this model" if same else "another model"


def _seen(artifact: Artifact, settings: Mapping[str, Any]) -> str | None:
    """The text that the artifact and the evaluation have both read; None where the settings do not tell."""
    try:
        return overlap(artifact.data, _source(settings))
    except (AttributeError, TypeError, ValueError, OSError):  # of another form than ours, or no file can have the name
        return None


def _warnings(artifact: Artifact, body: Mapping[str, Any], full: Mapping[str, Any], name: str) -> list[str]:
    found, settings = [], body["settings"]
    whose = _whose(artifact, settings)
    if whose != "this artifact":
        found.append(f"{name} was measured with {whose}.")
    if body.get("partial"):
        found.append(f"{name}: {len(body['partial'])} settings are not finished: repeat the command that made it.")
    if whose != "another model" and (seen := _seen(artifact, settings)):
        found.append(
            f"{name}: the text {short_name(seen)} was also calibrated on: methods may look better than they are."
        )
    for task, score in low_scores({"scores": _known(full, "scores")}).items():
        found.append(
            f"{name}: the model itself scores {score:.2f} in {short_name(task)}: read scores relative to its own."
        )
    prefix, seq_len = settings.get("prefix"), artifact.data.get("seq_len")
    if isinstance(prefix, int) and isinstance(seq_len, int) and prefix > seq_len:
        found.append(
            f"{name}: contexts of {prefix} tokens, but blocks of {seq_len} in calibration: bases may fail beyond."
        )
    return found
