"""Bytes that a 16-bit cache holds with a setting, over those of all keys and values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from kvcal.artifacts import Artifact
from kvcal.calibrate.planning.points import Problem

FULL: dict[str, Any] = {"method": "full"}


def resident(problems: Sequence[Problem], setting: Mapping[str, Any], artifact: Artifact) -> float:
    """Of all layers, after a decoded token, which is when methods evict. Tables of the artifact, of which there is one
    per model, are left out.

    Args:
        problems: of `to_the_prefix`.
    """
    held, whole = (sum(_held(problem, of, artifact) for problem in problems) for of in (setting, FULL))
    return held / whole


def to_the_prefix(problem: Problem) -> Problem:
    """The first text up to its prefix, of which the last token is decoded: buffers grow by 256 tokens, and one of 2048
    leaves no slack in them."""
    tensors = {name: getattr(problem, name)[:1, :, : problem.prefix] for name in ("key", "value")}
    return dataclasses.replace(problem, query=problem.query[:1, :, :1], **tensors, texts=1)


def _held(problem: Problem, setting: Mapping[str, Any], artifact: Artifact) -> int:
    store = problem.store(setting, artifact)
    query, key, value, *_ = next(problem.steps())
    store.append(key, value)
    store.attend(query, problem.spec)
    return store.resident_bytes()
