"""The first token of a text: how much attention it receives, how often a method reads it, and what missing it costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kvcal.artifacts import Artifact
from kvcal.calibrate.evaluation.standard_errors import mean
from kvcal.calibrate.planning.points import Problem, relative_error
from kvcal.runtime.attention import SoftmaxSpec
from kvcal.runtime.methods.basis import Basis

from .settings import ONLY_CHOSEN

Setting = dict[str, Any]
SETTINGS: list[Setting] = [
    {"method": "loki", "rank": 0.25, "keep": 0.25, "basis": "pca", "select": "head", **ONLY_CHOSEN},
    {"method": "loki", "rank": 0.5, "keep": 0.25, "basis": "pca", "select": "head", **ONLY_CHOSEN},
    {"method": "loki", "rank": 0.25, "keep": 0.25, "basis": "score", "select": "head", **ONLY_CHOSEN},
    {"method": "loki", "rank": 0.125, "keep": 0.0625, "basis": "score", "select": "head", **ONLY_CHOSEN},
    {"method": "quest", "page": 16, "keep": 0.25, "select": "head", "sinks": 0},
    {"method": "quest", "page": 16, "keep": 0.0625, "select": "head", "sinks": 0},
    {"method": "exact_topk", "keep": 0.25, "select": "head"},
    {"method": "exact_topk", "keep": 0.0625, "select": "head"},
]
"""Loki as published, with twice the rank and with the score basis; what Quest's boxes and exact scores choose."""
WITH_SINKS = ("loki", "quest")
"""Methods that can be told to read the first token, or its page, whatever its score."""


def first_token(found: Sequence[Problem], artifact: Artifact) -> list[dict[str, Any]]:
    """Of each setting, means of layers: "mass", of the dense attention on the first token; "read", the share of heads
    and steps that read it; "error" of the attention output, and "error_with" where it is read always, of `WITH_SINKS`.
    "…_se" of each, over texts."""
    rows = []
    for setting in SETTINGS:
        layers = [_layer(problem, setting, artifact) for problem in found]
        row: dict[str, Any] = {"setting": setting}
        for name in layers[0]:
            row[name], row[f"{name}_se"] = mean(torch.stack([layer[name] for layer in layers]).mean(0).tolist())
        rows.append({**row, "read_by_layer": [round(float(layer["read"].mean()), 4) for layer in layers]})
    return rows


OTHERS = 64
"""Tokens from here on are what the first is compared with, the last 48 left out: they are near every query."""


def standing_out(found: Sequence[Problem], artifact: Artifact, rank: float = 0.25) -> list[dict[str, float]]:
    """Of each layer, means of heads and queries: "logit", of the first token above the mean of the others; "in_pca" and
    "in_score", the same in the first dimensions of either basis; "length", of its key, and "length_of_others"."""
    rows = []
    for problem in found:
        query, key = problem.query.float(), problem.key.float()
        dims = max(1, round(rank * key.shape[-1]))
        bases = {name: Basis.load(artifact, problem.layer, dims, basis=name) for name in ("pca", "score")}
        lengths = key.norm(dim=-1)
        rows.append(
            {
                "layer": problem.layer,
                "logit": _above(query, key, problem.spec),
                **{f"in_{name}": _above(*_mapped(basis, query, key), problem.spec) for name, basis in bases.items()},
                "length": float(lengths[..., 0].mean()),
                "length_of_others": float(lengths[..., OTHERS:-48].mean()),
            }
        )
    return rows


def _mapped(basis: Basis, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    query_map, key_map = (each[:, : basis.rank].float().mT for each in basis.maps(key))
    return (query.unflatten(1, (key.shape[1], -1)) @ query_map.unsqueeze(1)).flatten(1, 2), key @ key_map


def _above(query: torch.Tensor, key: torch.Tensor, spec: SoftmaxSpec) -> float:
    grouped = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    scores = spec.logits(grouped @ key.mT)
    return float((scores[..., 0] - scores[..., OTHERS:-48].mean(-1)).mean())


@torch.no_grad()
def _layer(problem: Problem, setting: Setting, artifact: Artifact) -> dict[str, torch.Tensor]:
    """[B] of each: means of heads and steps."""
    asked = {"error": setting}
    if setting["method"] in WITH_SINKS:
        asked["error_with"] = {**setting, "sinks": 1}
    found: dict[str, list[torch.Tensor]] = {name: [] for name in ("mass", "read", *asked)}
    for name, own in asked.items():
        store = problem.store(own, artifact)
        for query, key, value, weights, dense in problem.steps():
            store.append(key, value)
            out = store.attend(query, problem.spec)
            found[name].append(relative_error(out, dense).mean((1, 2)))
            if name == "error":
                found["mass"].append(weights[..., 0].flatten(1).mean(1))
                found["read"].append(store.read_mask()[..., 0].float().flatten(1).mean(1))
    return {name: torch.stack(values).mean(0) for name, values in found.items()}
