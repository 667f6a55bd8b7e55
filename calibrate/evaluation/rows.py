"""A row of the results: what one setting measured over all batches, and how that compares with `full`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ...artifacts.shown import html_table, short
from . import standard_errors
from .measurements import PERPLEXITY, Batch, Measured
from .prompts import Prompts

MEASURED = (
    "perplexity",
    "perplexity_se",
    "perplexity_ratio",
    "perplexity_ratio_se",
    "window_nll",
    "scores",
    "scores_se",
    "relative",
    "relative_se",
    "sample_scores",
    "scores_by_depth",
    "attention_error",
    "attention_error_se",
    "attention_mass",
    "resident_bytes",
    "bytes_per_step",
    "ms_per_step",
    "hit_rate",
    "source",
)
"""Keys of a row of the results that are not parameters of its method."""
LOW = 0.9
"""A score of `full` below which a task says little about methods: much of what they miss the model does not know."""


class Rows(list[dict[str, Any]]):
    """Rows of one evaluation, `full` first: a list, shown in a line, and as a table in a notebook."""

    def __repr__(self) -> str:
        return f"Rows({len(self)}: {short(', '.join(map(_setting_of, self)))})"

    def _repr_html_(self) -> str:
        tasks = list(dict.fromkeys(task for row in self for task in row.get("scores") or {}))
        header = ["setting", "bytes read / full", "bytes held / full", "perplexity / full", *tasks]
        return html_table(header, [[*self._compared(row), *(_score_of(row, task) for task in tasks)] for row in self])

    def _compared(self, row: Mapping[str, Any]) -> list[str]:
        shares = [
            f"{row[name] / self[0][name]:.3f}" if row.get(name) and self[0].get(name) else "–"
            for name in ("bytes_per_step", "resident_bytes")
        ]
        ratio = _with_error(row.get("perplexity_ratio"), row.get("perplexity_ratio_se"))
        return [_setting_of(row), *shares, ratio]


def result_row(
    setting: Mapping[str, Any],
    measured: Mapping[str, Measured],
    prompts: Prompts,
    work: Sequence[Batch],
    layers: int,
    full: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """One entry of "results". "…_se" are standard errors over windows or samples; see `standard_errors` for formulas.

    Bytes and times are those of the first task's batches (the perplexity windows, if there are any), since
    they depend on the length of the context.

    Args:
        measured: by `Batch.key`, for every batch of `work`.
        layers: of the model.
        full: the row of `full`; None when this is it.
    """
    by_task: dict[str, list[Measured]] = {}
    for batch in work:
        by_task.setdefault(batch.task, []).append(measured[batch.key])
    row = {**setting, **_perplexity(by_task.get(PERPLEXITY, []), prompts, layers), **_scores(by_task, prompts)}
    row |= compared(row, full or row)
    return row | _costs(next(iter(by_task.values())))


def compared(row: Mapping[str, Any], full: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a row that are relative to `full`, measured on the same windows and samples."""
    found: dict[str, Any] = {"perplexity_ratio": None, "perplexity_ratio_se": None, "relative": {}, "relative_se": {}}
    nll, base = row.get("window_nll"), full.get("window_nll")
    if nll and base and None not in nll and None not in base:
        found["perplexity_ratio"], found["perplexity_ratio_se"] = standard_errors.perplexity_ratio(nll, base)
    for task, scores in row.get("sample_scores", {}).items():
        of_full = full.get("sample_scores", {}).get(task)
        if of_full is not None:
            found["relative"][task], found["relative_se"][task] = standard_errors.relative(scores, of_full)
    return found


def low_scores(full: Mapping[str, Any]) -> dict[str, float]:
    """Scores of the tasks that the model itself cannot answer, from the row of `full`."""
    return {task: score for task, score in (full.get("scores") or {}).items() if score < LOW}


def mean_score(
    row: Mapping[str, Any], kind: str = "scores", tasks: Sequence[str] | None = None
) -> standard_errors.Estimate:
    """Mean over tasks and lengths.

    Args:
        kind: "scores" or "relative".
        tasks: None: all that were run.
    """
    found, errors = row.get(kind) or {}, row.get(f"{kind}_se") or {}
    names = [task for task in found if tasks is None or task in tasks]
    return standard_errors.mean_of([(found[task], errors.get(task)) for task in names if found[task] is not None])


def _perplexity(found: Sequence[Measured], prompts: Prompts, layers: int) -> dict[str, Any]:
    row: dict[str, Any] = {"perplexity": None, "perplexity_se": None, "window_nll": []}
    row |= {"attention_error": None, "attention_error_se": None, "attention_mass": None}
    if prompts.windows is None:
        return row
    tokens = prompts.windows.continuations.shape[1]
    nll = [each / tokens for batch in found for each in batch.nll]
    row["perplexity"], row["perplexity_se"] = standard_errors.perplexity(nll)
    row["window_nll"] = [standard_errors.mean([each])[0] for each in nll]
    for name, kind in (("attention_error", "error"), ("attention_mass", "mass")):
        parts = [getattr(batch, kind) for batch in found]
        by_layer = [
            [each for part in parts for each in part[layer]] if all(layer in part for part in parts) else None
            for layer in map(str, range(layers))
        ]
        row[name] = [None if rows is None else standard_errors.mean(rows)[0] for rows in by_layer]
        known = [rows for rows in by_layer if rows is not None]
        if kind == "error" and known:
            by_window = [statistics.fmean(layers) for layers in zip(*known, strict=True)]
            row["attention_error_se"] = standard_errors.mean(by_window)[1]
    return row


def _scores(by_task: Mapping[str, Sequence[Measured]], prompts: Prompts) -> dict[str, Any]:
    names = ("scores", "scores_se", "sample_scores", "scores_by_depth")
    row: dict[str, Any] = {name: {} for name in names}
    for task in prompts.tasks:
        samples = sorted((one for part in by_task[task.key] for one in part.samples), key=lambda one: int(one["index"]))
        scores = [sample["score"] for sample in samples]
        row["scores"][task.key], row["scores_se"][task.key] = standard_errors.mean(scores)
        row["sample_scores"][task.key] = scores
        depths = sorted({sample["depth"] for sample in samples if sample["depth"] is not None})
        row["scores_by_depth"][task.key] = {
            str(depth): statistics.mean(sample["score"] for sample in samples if sample["depth"] == depth)
            for depth in depths
        }
    return row


def _costs(batches: Sequence[Measured]) -> dict[str, Any]:
    counts = [batch.rows for batch in batches]
    row = {
        "resident_bytes": sum(batch.resident_bytes for batch in batches) / sum(counts),
        "bytes_per_step": sum(statistics.mean(batch.bytes_read) for batch in batches) / sum(counts),
        "ms_per_step": statistics.median(each for batch in batches if batch.rows == max(counts) for each in batch.ms),
    }
    hits, needed = (sum(batch.device_hits[which] for batch in batches) for which in (0, 1))
    return row | ({"hit_rate": hits / needed} if needed else {})


def _setting_of(row: Mapping[str, Any]) -> str:
    parameters = (f"{name} {value}" for name, value in row.items() if name not in (*MEASURED, "method"))
    return " ".join([str(row.get("method")), *parameters])


def _score_of(row: Mapping[str, Any], task: str) -> str:
    return _with_error((row.get("scores") or {}).get(task), (row.get("scores_se") or {}).get(task))


def _with_error(value: float | None, error: float | None) -> str:
    return "–" if value is None else f"{value:.3f}" + ("" if error is None else f" ± {error:.3f}")
