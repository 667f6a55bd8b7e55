"""What plan.json holds beside the settings, and what a check says against a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...artifacts import Artifact
from ...runtime.planned import FORMAT
from ..evaluation.prompts import Prompts, Windows
from .allocate import Choice, hull
from .candidates import Candidate
from .plan import Offers
from .points import Point
from .subject import Subject

BYTES_OF = "what dense attention reads in the layers with full attention"
MOST_PERPLEXITY, LEAST_SCORE = 1.1, 0.9
"""Perplexity and score over `full`'s, beyond which a plan gets a warning."""


@dataclass(frozen=True)
class Made:
    """A plan, and how it came about."""

    subject: Subject
    prompts: Prompts
    """What it was checked on."""
    offers: Offers
    choice: Choice
    checked: Mapping[str, Any]
    """Of `check_choice`."""
    dropped: Mapping[str, float]
    """See `answerable`."""
    candidates: Sequence[Candidate] = ()
    """All, as decoded, the best first."""

    @property
    def dense_bytes(self) -> float:
        assert self.prompts.windows is not None
        return dense_bytes(self.subject.artifact, self.prompts.windows, self.subject.model.dtype)


def plan_body(made: Made, how: Mapping[str, Any]) -> dict[str, Any]:
    """
    Args:
        how: what was asked for.
    """
    offers, choice, checked = made.offers, made.choice, made.checked
    full = checked["full"]
    return {
        "format": FORMAT,
        "layers": offers.layered(choice),
        **how,
        "bytes_of": BYTES_OF,
        "predicted": {"bytes": choice.bytes, "attention_error": choice.error},
        "measured": {
            "bytes": share_read(checked["bytes_per_step"], full["bytes_per_step"], made.dense_bytes),
            "attention_error": _mean(checked["attention_error"]),
            **{name: checked[name] for name in ("perplexity_ratio", "perplexity_ratio_se")},
            **{name: checked[name] for name in ("scores", "relative", "relative_se")},
        },
        "full": {"perplexity": full["perplexity"], "scores": full["scores"]},
        "dropped": dict(made.dropped),
        "warnings": ruinous(checked),
        "candidates": [_candidate(candidate) for candidate in made.candidates],
        "weights": {str(layer): weight for layer, weight in offers.weights.items()},
        "offers": {
            str(layer): [_offer(point) for point in _offered(points, choice.points[layer])]
            for layer, points in offers.points.items()
        },
    }


def dense_bytes(artifact: Artifact, windows: Windows, dtype: torch.dtype) -> float:
    """Bytes of keys and values that dense attention reads in the layers with full attention, per row and step of the
    windows' continuations: a mean over prefix + 1, …, prefix + steps tokens."""
    tokens = windows.prefix + windows.continuations.shape[1] / 2
    numbers = sum(layer.kv_heads * (layer.head_dim + layer.value_dim) for layer in artifact.full_layers)
    return tokens * numbers * dtype.itemsize


def share_read(read: float, full: float, dense: float) -> float:
    """The share of `dense` that is read. `full` and `read` count all layers; sliding ones read the same in both."""
    return 1 - (full - read) / dense


def ruinous(checked: Mapping[str, Any]) -> list[str]:
    """What a check says against a plan, in a line each.

    Args:
        checked: of `check_choice`.
    """
    found = []
    ratio = checked["perplexity_ratio"]
    if ratio is None or ratio > MOST_PERPLEXITY:
        found.append("perplexity is beyond measure" if ratio is None else f"perplexity is {ratio:.2f} of full's")
    for task, value in checked["relative"].items():
        if value is not None and value < LEAST_SCORE:
            found.append(f"{task} is answered {value:.2f} as well as by full")
    return found


def _candidate(candidate: Candidate) -> dict[str, Any]:
    first, *others = candidate.settings.values()
    alike = {name: value for name, value in first.items() if all(each.get(name) == value for each in others)}
    return {
        "kind": candidate.kind,
        "setting": alike if candidate.kind == "uniform" else None,
        "bytes": candidate.choice.bytes,
        "attention_error": candidate.choice.error,
        "divergence": candidate.divergence,
    }


def _offered(points: Sequence[Point], chosen: Point) -> list[Point]:
    """The points of the hull, and the chosen one, which in a uniform plan need not lie on it."""
    found = hull(points)
    if chosen.setting not in [point.setting for point in found]:
        found.append(next(point for point in points if point.setting == chosen.setting))
    return sorted(found, key=lambda point: point.bytes)


def _offer(point: Point) -> dict[str, Any]:
    return {"setting": point.setting, "bytes": point.bytes, "error": point.error, "head_errors": point.head_errors}


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known)
