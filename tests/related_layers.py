"""Artifacts of models whose layers are related in known ways, for tests of the stage `cla`."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from kvcal.artifacts import Artifact, Layer, ModelIdentity, Stage

HEADS, DIM, VALUE_DIM = 2, 6, 4


def artifact(layers: list[dict[str, Tensor]], windows: list[int | None] | None = None) -> Artifact:
    """An artifact with a reservoir only, of layers without a rotary embedding."""
    tokens = layers[0]["value"].shape[1]
    reservoir = {"token": torch.arange(tokens), "position": torch.arange(tokens) % 40}
    for index, tensors in enumerate(layers):
        reservoir |= {f"layers.{index}.{name}": tensor for name, tensor in tensors.items()}
    windows = windows or [None] * len(layers)
    return Artifact(
        model=ModelIdentity("org/model", None, {}, "0" * 64),
        layers=tuple(
            Layer(index, HEADS, 2 * HEADS, tensors["key_post"].shape[2], VALUE_DIM, 0.4, window, "none")
            for index, (tensors, window) in enumerate(zip(layers, windows, strict=True))
        ),
        data={"source": {"id": "text"}, "content_sha256": "1" * 64, "blocks": 9, "seq_len": 40, "tokens_counted": 360},
        settings={"seed": 0, "dtype": "float32"},
        versions={"kvcal": "0"},
        stages={"reservoir": Stage(reservoir)},
    )


def layer(seed: int, tokens: int = 90) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dims = {"key_post": DIM, "query_post": DIM, "value": VALUE_DIM}
    return {name: torch.randn(HEADS, tokens, dim, generator=generator) for name, dim in dims.items()}


def reading_copy(of: dict[str, Tensor], seed: int, mixed: bool = False) -> dict[str, Tensor]:
    """A layer of the same keys and values with queries of its own; `mixed`: through a random map between all heads."""
    made = {**of, "query_post": layer(seed, of["value"].shape[1])["query_post"]}
    if mixed:
        generator = torch.Generator().manual_seed(seed)
        for name in ("key_post", "value"):
            flat = of[name].transpose(0, 1).flatten(1)
            turned = flat @ torch.randn(flat.shape[1], flat.shape[1], generator=generator) / flat.shape[1] ** 0.5
            made[name] = turned.unflatten(1, (HEADS, -1)).transpose(0, 1).contiguous()
    return made


def with_trained_weights(found: Artifact) -> Artifact:
    """As uptraining leaves it."""
    stage = found.stages["cla"]
    tensors = {**stage.tensors, "weights.model.layers.0.self_attn.k_proj.weight": torch.ones(3, 2)}
    return found.with_stage("cla", dataclasses.replace(stage, tensors=tensors))
