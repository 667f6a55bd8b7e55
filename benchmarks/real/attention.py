"""What a method loses in the attention of each layer, on the keys of unseen text: no model is decoded.

Keys, queries and values are those of one dense pass, in bfloat16, so that bytes are those of a 16-bit cache. The last
STEPS tokens of every row are decoded through the method's store; the error is ‖o − o_dense‖ / ‖o_dense‖.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvcal.artifacts import Artifact
from kvcal.calibrate import make_blocks, open_data
from kvcal.calibrate.evaluation.standard_errors import mean
from kvcal.calibrate.planning.points import Problem, measure, problems

STEPS = 16
BATCH = 8
"""Sequences that share what a step reads once, as in the decoded tables."""
Setting = dict[str, Any]


def unseen(loaded: Any, texts: Sequence[str], rows: int, length: int) -> list[Problem]:
    """Of `rows` pieces of unseen text, `length` tokens and STEPS more."""
    return of_rows(loaded, blocks(loaded, texts, rows, length + STEPS))


def blocks(loaded: Any, texts: Sequence[str], rows: int, length: int) -> Tensor:
    """[rows, length] int64 of text."""
    made = make_blocks(open_data(list(texts)), loaded.tokenizer, num_tokens=rows * length, seq_len=length)
    return made.ids.long()


def of_rows(loaded: Any, rows: Tensor) -> list[Problem]:
    """
    Args:
        rows: [B, T] int64, of which the last STEPS tokens are decoded.
    """
    found: list[Problem] = []
    for row in rows:  # one at a time: a pass over all would hold all of their activations
        found = _join(found, problems(loaded.model, row[None], STEPS, 1))
    return found


def _join(first: list[Problem], second: list[Problem]) -> list[Problem]:
    second = [_each(problem, lambda tensor: tensor.bfloat16()) for problem in second]
    if not first:
        return second
    return [
        dataclasses.replace(
            one,
            query=torch.cat((one.query, other.query)),
            key=torch.cat((one.key, other.key)),
            value=torch.cat((one.value, other.value)),
            texts=one.texts + other.texts,
        )
        for one, other in zip(first, second, strict=True)
    ]


def _each(problem: Problem, change: Any) -> Problem:
    tensors: dict[str, Tensor] = {name: change(getattr(problem, name)) for name in ("query", "key", "value")}
    return dataclasses.replace(problem, **tensors)


def errors(found: Sequence[Problem], settings: Sequence[Setting], artifact: Artifact | None) -> list[dict[str, Any]]:
    """Of each setting {"setting", "artifact": its hash, "bytes": over dense, "error": mean of layers, "error_se": over
    texts, "by_layer": {layer: error}, "by_text": [error]}."""
    by_layer = {problem.layer: measure(problem, settings, artifact, torch.device("cpu"), BATCH) for problem in found}
    rows = []
    for index, setting in enumerate(settings):
        points = {layer: points[index] for layer, points in by_layer.items()}
        by_text = torch.tensor([point.text_errors for point in points.values()]).mean(0).tolist()
        error, error_se = mean(by_text)
        rows.append(
            {
                "setting": setting,
                "artifact": artifact and artifact.content_hash,
                "bytes": statistics.fmean(point.bytes for point in points.values()),
                "error": error,
                "error_se": error_se,
                "by_layer": {str(layer): round(point.error, 5) for layer, point in points.items()},
                "by_text": [round(error, 5) for error in by_text],
            }
        )
    return rows
