"""Every method once: settings that tests make it with, what they compare it with, and its bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import hand_counts
import oracles
import oracles_evicting
from hand_counts import Bytes
from sequences import Geometry, Step

from kvcal.runtime.methods import METHODS

Settings = dict[str, Any]
G64, G80, G128, G256 = (
    Geometry(64, 64, 2, 1),
    Geometry(80, 48, 2, 4),
    Geometry(128, 128, 1, 7),
    Geometry(256, 256, 1, 4),
)
SHORT, LONG = (1, 63, 100), (1, 63, 100, 2000)
Formula = tuple[Geometry, tuple[int, ...], int, str, Settings]
"""Of a batch: its prompts, decoded tokens, how q·k becomes logits, settings."""


@dataclass(frozen=True)
class Case:
    forms: dict[str, Settings]
    """By name, with budgets that rows of a few tokens feel: what must hold of every store."""
    small: dict[str, Settings]
    """By name, on tiny models."""
    decoded: dict[str, Settings]
    """By name, by fixed steps on tiny models; none where none is captured."""
    bytes: Callable[..., Bytes | None]
    counted: list[tuple[int, Settings]] = field(default_factory=list)
    """Prompts and settings whose bytes are held against `bytes`."""
    oracle: Callable[..., list[Step]] | None = None
    """The steps of a row in float64, from the paper; None: elsewhere, in tests of its own."""
    published: Settings = field(default_factory=dict)
    """What oracles do where settings do not say it: as published, while defaults were measured."""
    formulas: list[Formula] = field(default_factory=list)


ONLY_CHOSEN = {"sinks": 0, "recent": 0}
PCA = {"basis": "pca", "select": "head", **ONLY_CHOSEN}
"""As published."""
CLUSTERS = {"keep": 0.4, "tokens_per_cluster": 4, "sinks": 2, "window": 3}
ON_MODELS = {"keep": 0.3, "tokens_per_cluster": 4, "sinks": 2, "window": 4}
CODED = {"keep": 0.3, "sinks": 2, "recent": 2, "rank": 1.0}
SPECTRAL = {"keep": 12, "rank": 0.5, "sinks": 2, "recent": 3}
SUBGEN = {"window": 6, "sinks": 2, "s": 7}

CASES: dict[str, Case] = {
    "full": Case(
        forms={"full": {}},
        small={"full": {}},
        decoded={"full": {}, "full-mass": {"record_mass": True}},
        bytes=hand_counts.full,
        counted=[(prompt, {}) for prompt in (1, 255, 256, 700)],
        oracle=oracles.full,
        formulas=[(G80, SHORT, 2, "sinks", {}), (G64, LONG, 2, "plain", {})],
    ),
    "loki": Case(
        forms={
            "loki-pca": {**PCA, "rank": 0.25, "keep": 0.25},
            "loki-score": {"rank": 0.25, "keep": 0.25, "basis": "score", "select": "group", **ONLY_CHOSEN},
            "loki-sinks": {"rank": 0.25, "keep": 0.4, "basis": "pca", "select": "max", "sinks": 2, "recent": 3},
            "loki-sampled": {"rank": 0.25, "keep": 0.25, "choice": "sampled", "sample": 16, "recent": 2},
        },
        small={
            "loki": {**PCA, "rank": 0.5, "keep": 0.25},
            "loki-sinks": {"basis": "pca", "rank": 0.5, "keep": 0.3, "sinks": 2, "recent": 3},
        },
        decoded={
            "loki": {**PCA, "rank": 0.5, "keep": 0.5},
            "loki-max": {**PCA, "rank": 0.25, "keep": 0.25, "select": "max"},
            "loki-group": {**PCA, "rank": 8, "keep": 12, "select": "group", "dense_below": 25},
            "loki-score": {"rank": 0.5, "keep": 0.3, "basis": "score", "select": "head"},
            "loki-score-group": {"rank": 0.125, "keep": 0.25, "basis": "score", "select": "group"},
            "loki-sinks": {**PCA, "rank": 0.5, "keep": 0.3, "sinks": 1, "recent": 3, "dense_below": 12},
            "loki-sampled": {"keep": 0.4, "choice": "sampled", "sample": 16},
        },
        bytes=hand_counts.loki,
        counted=[
            (299, {"rank": 0.25, "keep": 0.25, "select": select, "basis": basis})
            for select in ("head", "group")
            for basis in ("pca", "score")
        ],
        oracle=oracles.loki,
        published={**PCA, "rank": 0.25},
        formulas=[
            (G64, LONG, 3, "plain", {"rank": 0.25, "keep": 0.25}),
            (G80, SHORT, 3, "plain", {"rank": 20, "keep": 24, "select": "group"}),
            (G128, SHORT, 3, "softcap", {"rank": 0.5, "keep": 0.1, "basis": "score", "select": "group"}),
            (G256, SHORT, 3, "sinks", {"rank": 0.125, "keep": 0.25, "basis": "score"}),
            (G80, SHORT, 3, "sinks", {"rank": 0.25, "keep": 0.25, "dense_below": 80}),
            (G128, SHORT, 3, "softcap", {"rank": 0.5, "keep": 0.1, "select": "max"}),
        ],
    ),
    "exact_topk": Case(
        forms={"exact_topk": {"keep": 0.25, "select": "group"}},
        small={"exact_topk": {"keep": 0.25, "select": "head"}},
        decoded={
            "exact_topk": {"keep": 0.3, "select": "head"},
            "exact_topk-group": {"keep": 9, "dense_below": 25},
        },
        bytes=hand_counts.exact_topk,
        counted=[(299, {"keep": 0.1, "select": select}) for select in ("head", "group")],
        oracle=oracles.exact_topk,
        published={"select": "head"},
        formulas=[
            (G64, LONG, 3, "plain", {"keep": 0.25}),
            (G80, SHORT, 3, "sinks", {"keep": 0.1, "select": "group"}),
            (G80, SHORT, 3, "sinks", {"keep": 0.1, "select": "max"}),
            (G128, SHORT, 3, "softcap", {"keep": 16}),
            (G256, SHORT, 3, "plain", {"keep": 0.5, "select": "group", "dense_below": 66}),
        ],
    ),
    "quest": Case(
        forms={
            "quest": {"keep": 0.3, "page": 4, "select": "head", "sinks": 0},
            "quest-sinks": {"keep": 0.5, "page": 4, "sinks": 3, "recent": 5},
        },
        small={
            "quest": {"keep": 0.25, "page": 4, "select": "head", "sinks": 0},
            "quest-sinks": {"page": 4, "keep": 0.3, "sinks": 3},
        },
        decoded={
            "quest": {"keep": 0.4, "page": 4, "select": "head", "sinks": 0},
            "quest-sinks": {"keep": 0.5, "page": 8, "sinks": 3, "recent": 9},
        },
        bytes=hand_counts.quest,
        counted=[
            (299, {"keep": 0.25, "select": select, "page": page}) for select in ("head", "group") for page in (16, 4)
        ],
        oracle=oracles.quest,
        published={"select": "head", **ONLY_CHOSEN},
        formulas=[
            (G80, SHORT, 18, "plain", {"keep": 0.3, "select": "max"}),
            (G64, LONG, 18, "plain", {"keep": 0.25}),
            (G80, SHORT, 18, "sinks", {"keep": 0.3, "select": "group"}),
            (G128, SHORT, 6, "softcap", {"keep": 20, "page": 8, "select": "group"}),
            (G256, SHORT, 3, "plain", {"keep": 1, "page": 4, "dense_below": 64}),
        ],
    ),
    "sparq": Case(
        forms={"sparq": {"rank": 0.25, "keep": 0.25, "select": "head"}},
        small={"sparq": {"rank": 0.5, "keep": 0.25, "select": "head"}},
        decoded={
            "sparq": {"rank": 0.5, "keep": 0.3, "select": "head"},
            "sparq-group": {"rank": 4, "keep": 9, "dense_below": 25},
        },
        bytes=hand_counts.sparq,
        counted=[(299, {"rank": 0.25, "keep": 0.25, "select": select}) for select in ("head", "group")],
        oracle=oracles.sparq,
        published={"rank": 0.25, "select": "head"},
        formulas=[
            (G64, LONG, 3, "plain", {"rank": 0.25, "keep": 0.25}),
            (G80, SHORT, 3, "sinks", {"rank": 0.5, "keep": 0.25}),
            (G128, SHORT, 3, "softcap", {"rank": 16, "keep": 0.25, "select": "group"}),
            (G256, SHORT, 3, "sinks", {"rank": 0.25, "keep": 10, "select": "group", "dense_below": 80}),
        ],
    ),
    "clusterkv": Case(
        forms={
            "clusterkv": CLUSTERS,
            "clusterkv-tail": {**CLUSTERS, "tail": True, "select": "head"},
            "clusterkv-offload": {**CLUSTERS, "offload": "cpu", "cached": 5},
        },
        small={
            "clusterkv": ON_MODELS,
            "clusterkv-tail": {**ON_MODELS, "tail": True, "offload": "cpu", "cached": 7},
        },
        decoded={
            "clusterkv": {"keep": 20, "tokens_per_cluster": 4, "window": 5, "sinks": 2},
            "clusterkv-head": {"keep": 0.6, "tokens_per_cluster": 3, "window": 4, "select": "head"},
            "clusterkv-max": {"keep": 9, "tokens_per_cluster": 3, "sinks": 0, "select": "max"},
            "clusterkv-tail": {"keep": 12, "tokens_per_cluster": 3, "sinks": 2, "tail": True},
            "clusterkv-tail-head": {"keep": 9, "tokens_per_cluster": 4, "tail": True, "select": "head"},
        },
        bytes=hand_counts.clusterkv,
        counted=[
            (prompt, {"keep": 75, "select": select, "tail": tail, "tokens_per_cluster": size})
            for prompt, size in ((299, 80), (299, 7), (1100, 3))
            for select in ("head", "group")
            for tail in (False, True)
        ]
        + [(11, {"keep": 4})],  # nothing is clustered yet
    ),
    "spectral": Case(
        forms={
            "spectral": CODED,
            "spectral-head": {**CODED, "select": "head", "bits": 4, "choice": "exact"},
            "spectral-no-residual": {**CODED, "residual": False, "select": "max", "bits": 8},
            "spectral-8-bit-rows": {**CODED, "rows": 8, "sample": 16},
            "spectral-xcla-rows": {**CODED, "rows": "xcla"},
        },
        small={
            "spectral": {"rank": 1.0, "bits": 4, "keep": 0.3, "recent": 2},
            "spectral-8": {"rank": 1.0, "keep": 0.3, "recent": 2, "rows": 8, "sample": 16},
            "spectral-xcla": {"rank": 1.0, "bits": 4, "keep": 0.3, "recent": 2, "rows": "xcla"},
        },
        decoded={
            "spectral": SPECTRAL,
            "spectral-4-bits-head": {**SPECTRAL, "bits": 4, "select": "head", "keep": 0.3},
            "spectral-no-residual": {**SPECTRAL, "bits": 8, "select": "max", "residual": False, "dense_below": 25},
            "spectral-sampled": {**SPECTRAL, "sample": 16, "keep": 0.3},
            "spectral-8-bit-rows": {**SPECTRAL, "rows": 8, "sinks": 0, "keep": 5},
        },
        bytes=hand_counts.spectral,
        counted=[(149, {**CODED, "keep": 30, **other}) for other in ({}, {"bits": 4, "rows": 8}, {"residual": False})],
    ),
    "streaming": Case(
        forms={"streaming": {"keep": 0.25, "sinks": 2}},
        small={"streaming": {"keep": 0.25, "sinks": 2}},
        decoded={
            "streaming": {"keep": 0.4, "sinks": 2},
            "streaming-count": {"keep": 12, "dense_below": 30},
        },
        bytes=hand_counts.streaming,
        counted=[(699, {"keep": 0.1})],
        oracle=oracles_evicting.streaming,
        formulas=[
            (G64, LONG, 12, "plain", {"keep": 0.25}),
            (G80, SHORT, 12, "sinks", {"keep": 0.1, "sinks": 2}),
            (G128, SHORT, 12, "softcap", {"keep": 3, "sinks": 4}),
            (G256, SHORT, 12, "plain", {"keep": 0.5, "sinks": 0, "dense_below": 70}),
            (G80, SHORT, 6, "plain", {"keep": 1}),
        ],
    ),
    "h2o": Case(
        forms={"h2o": {"keep": 0.25}},
        small={"h2o": {"keep": 0.25}},
        decoded={"h2o": {"keep": 0.3}, "h2o-count": {"keep": 11, "dense_below": 45}},
        bytes=hand_counts.h2o,
        counted=[(699, {"keep": 0.1})],
        oracle=oracles_evicting.h2o,
        formulas=[
            (G64, LONG, 12, "plain", {"keep": 0.25}),
            (G80, SHORT, 12, "sinks", {"keep": 0.1}),
            (G128, SHORT, 12, "softcap", {"keep": 9}),
            (G256, SHORT, 12, "plain", {"keep": 0.5, "dense_below": 70}),
            (G80, SHORT, 6, "plain", {"keep": 1}),
        ],
    ),
    "snapkv": Case(
        forms={
            "snapkv": {"keep": 0.4, "window": 4, "kernel": 3},
            "snapkv-max": {"keep": 9, "window": 2, "kernel": 5, "pooling": "max", "dense_below": 12},
        },
        small={"snapkv": {"keep": 0.25, "window": 3}},
        decoded={
            "snapkv": {"keep": 0.4, "window": 5},
            "snapkv-count": {"keep": 18, "window": 4, "kernel": 3, "dense_below": 12},
        },
        bytes=hand_counts.snapkv,
        counted=[(700, {"keep": 70})],
        oracle=oracles_evicting.snapkv,
        formulas=[
            (G64, LONG, 5, "plain", {"keep": 0.25}),
            (G80, SHORT, 5, "sinks", {"keep": 30, "window": 8, "kernel": 7, "pooling": "max"}),
            (G128, SHORT, 5, "softcap", {"keep": 0.3, "window": 4, "kernel": 3}),
            (G256, SHORT, 5, "plain", {"keep": 5, "window": 16, "kernel": 1, "dense_below": 70}),
            (G80, SHORT, 5, "plain", {"keep": 99, "window": 4}),
        ],
    ),
    "subgen": Case(
        forms={
            "subgen": {**SUBGEN, "clusters": 5, "t": 2, "normaliser": "clusters"},
            "subgen-values": {**SUBGEN, "normaliser": "values"},
        },
        small={
            "subgen": {**SUBGEN, "clusters": 5, "t": 2, "normaliser": "clusters"},
            "subgen-values": {**SUBGEN, "normaliser": "values"},
        },
        decoded={},
        bytes=hand_counts.subgen,
        counted=[(400, {**SUBGEN, "normaliser": "values"}), (5, SUBGEN)],
    ),
    "xcla": Case(
        forms={"xcla": {"recent": 3}},
        small={"xcla": {"recent": 3}},
        decoded={},
        bytes=hand_counts.xcla,
        counted=[(1, {}), (255, {"recent": 7}), (700, {})],
    ),
}
assert CASES.keys() == METHODS.keys()


def by_form(kind: str) -> dict[str, tuple[str, Settings]]:
    """(method, settings) by name, of "forms", "small" or "decoded"."""
    return {name: (method, of) for method, case in CASES.items() for name, of in getattr(case, kind).items()}


FORMS = by_form("forms")
EVICTING = [name for name, (method, _) in FORMS.items() if not METHODS[method].keeps_all_tokens]
KEEPING = [name for name in FORMS if name not in EVICTING]
CLUSTERED = [name for name, (_, settings) in FORMS.items() if "tokens_per_cluster" in settings]
"""Those whose tokens are in clusters."""
ORACLES = {method: case.oracle for method, case in CASES.items() if case.oracle is not None}
PUBLISHED = {method: case.published for method, case in CASES.items()}
