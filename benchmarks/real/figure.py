"""Figures of docs/results/real.md: quality against bytes of a 16-bit cache, and how clusterable keys are."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from kvcal.calibrate.evaluation.figure import evaluation_figure
from kvcal.calibrate.evaluation.results_file import parameters
from kvcal.calibrate.palette import LAYER_COLORS
from kvcal.calibrate.plots import png, two_panels

from ..shared.lookup import read
from ..shared.page import Figure
from .page_decoding import bytes_of, key_of, row_of
from .page_sharing import trained
from .settings import OF_A_PREFILL
from .sharing import FITTED, TRAINED
from .subjects import SUBJECTS, Subject
from .xcla import ALL, CHOSEN, CODES

Row = Mapping[str, Any]
CLUSTERS = "real-clusters.png"
MOST = 2.0
"""Perplexity over full's: what loses more leaves the panels, it would flatten all others."""
_NAMED = ("method", "basis", "keep")
_MEASURED = ("perplexity_ratio", "perplexity_ratio_se", "scores", "scores_se")


def figures(results: Path, subject: Subject) -> list[Figure]:
    found = []
    if read(results / f"{subject.model}-methods-{subject.shortest}.json").get("results"):
        sources = sorted(results.glob(f"{subject.model}-*.json"))
        found.append(Figure("real.png", sources, partial(_quality, results, subject)))
    curves = {name: read(results / f"{name}-subgen.json").get("clusterable") for name in SUBJECTS}
    if measured := {name: curve for name, curve in curves.items() if curve}:
        sources = [results / f"{name}-subgen.json" for name in measured]
        found.append(Figure(CLUSTERS, sources, partial(_clusters, measured)))
    return found


def _quality(results: Path, subject: Subject) -> bytes:
    groups = (_of_methods, _of_sharing, _of_codes, _simulated)
    rows = [row for rows_of in groups for row in rows_of(results, subject)]
    settings = {"model": f"{subject.model}, bytes of a 16-bit cache", "prefix": subject.shortest}
    return evaluation_figure(settings, rows, MOST)


def _of_methods(results: Path, subject: Subject) -> Iterator[dict[str, Any]]:
    """Rows with no settings but those that name their line, since all others follow from their bytes."""
    length = subject.shortest
    shares = bytes_of(results, subject, length)
    held = {
        key_of(json.loads(key)): share for key, share in read(results / f"{subject.model}-memory-{length}.json").items()
    }
    for row in read(results / f"{subject.model}-methods-{length}.json")["results"]:
        share = shares(row)
        if share is None or row.get("normaliser") == "clusters":  # SubGen as published would only cross all panels
            continue
        if row.get("sinks") == 0 and row.get("basis") != "pca":  # of Loki and Quest one line, and Loki's as published
            continue
        kept = {name: row[name] for name in (*_NAMED, *_MEASURED) if name in row}
        if row["method"] == "clusterkv":  # in every level a setting as published, and one of small clusters
            kept["tokens_per_cluster"] = 80 if row["tokens_per_cluster"] == 80 else "16, 32"
        holds = share if row["method"] in OF_A_PREFILL else held.get(key_of(parameters(row)))
        yield {**kept, "bytes_per_step": share, "resident_bytes": 1.0 if row["method"] == "full" else holds}


def _of_sharing(results: Path, subject: Subject) -> Iterator[dict[str, Any]]:
    """Cross-layer attention in the pattern that was trained: fitted, and after the longest training."""
    path = results / f"{subject.model}-sharing-{TRAINED}.json"
    full, fitted = row_of(path, {"method": "full"}), row_of(path, FITTED)
    longest = [row for _, row in trained(results, subject)[-1:]]
    for name, row in zip(("cla, fitted", "cla, trained"), [fitted, *longest], strict=False):
        if full and row:
            costs = {cost: row[cost] / full[cost] for cost in ("bytes_per_step", "resident_bytes")}
            yield {**{measured: row[measured] for measured in _MEASURED}, **costs, "method": name}


def _of_codes(results: Path, subject: Subject) -> Iterator[dict[str, Any]]:
    """Common coefficients, by memory; decoded in float32, where all rows of `full` are twice as large."""
    for group, memory in CODES:
        path = results / f"{subject.model}-xcla-{group}-{memory}.json"
        full = row_of(path, {"method": "full"})
        for setting in (ALL, CHOSEN):
            row = row_of(path, setting)
            if full and row:
                name = "xcla" if setting is ALL else "spectral, rows of xcla"
                name += f", groups of {group}" if group > 1 else ", each layer by itself"
                costs = {cost: 2 * row[cost] / full[cost] for cost in ("bytes_per_step", "resident_bytes")}
                yield {**{measured: row[measured] for measured in _MEASURED}, **costs, "method": name}


def _simulated(results: Path, subject: Subject) -> Iterator[dict[str, Any]]:
    """Fewer bits of each layer's own keys and values."""
    for row in read(results / f"{subject.model}-shared-basis-text.json").get("rows", [])[1:]:
        if row["size"] is None:
            costs = {"bytes_per_step": row["bytes"], "resident_bytes": row["bytes"]}
            measured = {name: row[name] for name in _MEASURED}
            yield {**measured, **costs, "method": "fewer bits", "source": "simulated"}


def _clusters(curves: Mapping[str, Mapping[str, Any]]) -> bytes:
    """The radius of balls against their number, by layer: after the rotary embedding, and before."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    figure, panels = two_panels()
    shades = LinearSegmentedColormap.from_list("layers", LAYER_COLORS)
    for axis, (stage, title) in zip(panels, (("post", "rotated keys"), ("pre", "keys before rotation")), strict=True):
        for style, (name, stages) in zip(itertools.cycle(("-", "--", ":")), curves.items(), strict=False):
            last = max(entry["layer"] for entry in stages[stage])
            for entry in stages[stage]:
                color = shades(entry["layer"] / max(1, last))
                axis.plot(entry["counts"], entry["radius"], style, color=color, linewidth=1)
            axis.plot([], [], style, color="0.3", label=name)
        axis.set_xscale("log", base=2)
        axis.set(xlabel="clusters", ylabel="largest radius, over that of one cluster", ylim=(0, 1.05))
        axis.set_title(title, fontsize=10)
    panels[0].legend(fontsize=8, frameon=False, loc="lower left")
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), shades), ax=panels, ticks=[0, 1])
    bar.set_ticklabels(["first layer", "last layer"])
    return png(figure, "Do few balls cover the keys? Greedy centers, means of KV heads")
