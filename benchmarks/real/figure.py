"""docs/results/real.png: quality against bytes of a 16-bit cache, of the methods at the shortest length."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from page_decoding import bytes_of
from subjects import Subject
from tables import read

from kvcal.calibrate.evaluation.figure import evaluation_figure

MOST = 2.0
"""Perplexity over full's: what loses more leaves the panel, it would flatten all others."""
_NAMED = ("method", "basis", "keep")
_MEASURED = ("perplexity_ratio", "perplexity_ratio_se", "scores", "scores_se")


def write(folder: Path, subject: Subject) -> None:
    length = subject.shortest
    body = read(folder / "real" / f"{subject.model}-methods-{length}.json")
    if body.get("results"):
        shares = bytes_of(folder / "real", subject, length)
        rows = [drawn for row in body["results"] if (drawn := _drawn(row, shares))]
        settings = {"model": f"{subject.model}, bytes of a 16-bit cache", "prefix": length}
        (folder / "real.png").write_bytes(evaluation_figure(settings, rows, MOST))


def _drawn(row: Mapping[str, Any], shares: Callable[[Mapping[str, Any]], float | None]) -> dict[str, Any] | None:
    """The row with no settings but those that name its line, since all others follow from its bytes."""
    share = shares(row)
    if share is None or row.get("normaliser") == "clusters":  # SubGen as published would only cross both panels
        return None
    if row.get("sinks") == 0 and row.get("basis") != "pca":  # of Loki and Quest one line each, and Loki's as published
        return None
    kept = {name: row[name] for name in (*_NAMED, *_MEASURED) if name in row}
    if row["method"] == "clusterkv":  # in every level a setting as published, and one of small clusters
        kept["tokens_per_cluster"] = 80 if row["tokens_per_cluster"] == 80 else "16, 32"
    return {**kept, "bytes_per_step": share}
