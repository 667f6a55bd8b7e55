"""The first token of a text: how much attention it receives, how often a method reads it, and what missing it costs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from kvcal.artifacts import Artifact
from kvcal.calibrate.planning.points import Problem
from kvcal.runtime.attention import probabilities, weighted
from kvcal.runtime.settings import plan
from kvcal.runtime.stores.full import FullStore

Setting = dict[str, Any]
SETTINGS: list[Setting] = [
    {"method": "loki", "rank": 0.25, "keep": 0.25, "basis": "pca", "select": "head"},
    {"method": "loki", "rank": 0.5, "keep": 0.25, "basis": "pca", "select": "head"},
    {"method": "loki", "rank": 0.25, "keep": 0.25, "basis": "score", "select": "head"},
    {"method": "loki", "rank": 0.125, "keep": 0.0625, "basis": "score", "select": "head"},
    {"method": "quest", "page": 16, "keep": 0.25, "select": "head"},
    {"method": "quest", "page": 16, "keep": 0.0625, "select": "head"},
    {"method": "exact_topk", "keep": 0.25, "select": "head"},
    {"method": "exact_topk", "keep": 0.0625, "select": "head"},
]
"""Loki as published, with twice the rank and with the score basis; what Quest's boxes and exact scores choose."""


def first_token(found: Sequence[Problem], artifact: Artifact) -> list[dict[str, Any]]:
    """Of each setting, means of layers: "mass", of the dense attention on the first token; "read", the share of heads
    and steps that read it; "error" of the attention output, and "error_with" where it is read always."""
    rows = []
    for setting in SETTINGS:
        layers = [_layer(problem, setting, artifact) for problem in found]
        means = {name: statistics.mean(layer[name] for layer in layers) for name in layers[0]}
        rows.append({"setting": setting, **means, "read_by_layer": [round(layer["read"], 4) for layer in layers]})
    return rows


@torch.no_grad()
def _layer(problem: Problem, setting: Setting, artifact: Artifact) -> dict[str, float]:
    method = plan(setting, {}, [problem.layer], problem.layer + 1)[problem.layer]
    prefix = problem.key.shape[2] - problem.query.shape[2]
    found: dict[str, list[float]] = {"mass": [], "read": [], "error": [], "error_with": []}
    for name in ("error", "error_with"):
        store = method.build(problem.layer, problem.key.shape[3], artifact)()
        if name == "error_with":
            _always_first(store)
        full = FullStore()
        full.append(problem.key[:, :, :prefix], problem.value[:, :, :prefix])
        store.adopt(full)
        for at in range(prefix, problem.key.shape[2]):
            query, now = problem.query[:, :, at - prefix : at - prefix + 1], slice(at, at + 1)
            store.append(problem.key[:, :, now], problem.value[:, :, now])
            out = store.attend(query, problem.logits).float()
            weights = probabilities(query, problem.key[:, :, : at + 1], problem.logits)
            dense = weighted(weights, problem.value[:, :, : at + 1])
            found[name].append(float(((out - dense).norm(dim=-1) / dense.norm(dim=-1)).mean()))
            if name == "error":
                found["mass"].append(float(weights[..., 0].mean()))
                found["read"].append(float(store.read_mask()[..., 0].float().mean()))
    return {name: statistics.mean(values) for name, values in found.items()}


def _always_first(store: Any) -> None:
    """Whatever its score; of a method that scores pages, the first page."""
    shared = store._shared

    def with_first(own: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = shared(own).clone()
        scores[..., 0] = torch.inf
        return scores

    store._shared = with_first
