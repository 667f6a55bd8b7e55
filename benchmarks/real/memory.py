"""Bytes that a 16-bit cache holds with a setting, over those of all keys and values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from kvcal.artifacts import Artifact
from kvcal.calibrate.evaluation.grid import FULL
from kvcal.calibrate.planning.points import Problem

STEP = 256
"""Tokens by which buffers grow."""


def resident(problems: Sequence[Problem], setting: Mapping[str, Any], artifact: Artifact) -> float:
    """Of these layers, after a decoded token, which is when methods evict. Tables of the artifact, which is there once
    per model, are left out.

    Args:
        problems: of `to_the_prefix`.
    """
    held, whole = (sum(_held(problem, each, artifact) for problem in problems) for each in (setting, FULL))
    return held / whole


def to_the_prefix(problem: Problem) -> Problem:
    """The first text up to its prefix, as if the last token of that were the decoded one: where buffers are full, they
    have no slack. The query, which no byte depends on, is that of the token after."""
    assert problem.prefix % STEP == 0, f"a prefix of {problem.prefix} tokens: give a multiple of {STEP}"
    tensors = {name: getattr(problem, name)[:1, :, : problem.prefix] for name in ("key", "value")}
    return dataclasses.replace(problem, query=problem.query[:1, :, :1], **tensors, texts=1)


def _held(problem: Problem, setting: Mapping[str, Any], artifact: Artifact) -> int:
    store = problem.store(setting, artifact)
    query, key, value, *_ = next(problem.steps())
    store.append(key, value)
    store.attend(query, problem.spec)
    return store.resident_bytes()
