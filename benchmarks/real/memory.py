"""Bytes that a 16-bit cache holds with a setting, over those of all keys and values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from kvcal.artifacts import Artifact
from kvcal.calibrate.planning.points import Problem

FULL: dict[str, Any] = {"method": "full"}


def resident(problems: Sequence[Problem], setting: Mapping[str, Any], artifact: Artifact) -> float:
    """Of all layers, after the last step; tables of the artifact, which are there once per model, are left out."""
    held, whole = (sum(_held(problem, of, artifact) for problem in problems) for of in (setting, FULL))
    return held / whole


def _held(problem: Problem, setting: Mapping[str, Any], artifact: Artifact) -> int:
    store = problem.store(setting, artifact)
    for query, key, value, _ in problem.decoded():
        store.append(key, value)
        store.attend(query, problem.spec)
    return store.resident_bytes()


def first_text(problem: Problem) -> Problem:
    tensors = {name: getattr(problem, name)[:1] for name in ("query", "key", "value")}
    return dataclasses.replace(problem, **tensors, texts=1)
