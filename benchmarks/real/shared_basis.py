"""One basis for a group of layers: what attention loses when a cache holds coefficients of all its layers together.

A simulation, beside keys and values of fewer bits in the same bytes; no method of kvcal. For every KV head the keys of
a group before their rotary embedding, side by side, have a basis, in the metric of the queries and weighted by the
attention that tokens receive, from the reservoir; the values likewise. A cache would hold the first coefficients; each
layer has its own map back, and rotates its keys afterwards. Attention reads every token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvcal.artifacts import Artifact, Stage
from kvcal.calibrate.cla.cost import ReadingLayer
from kvcal.calibrate.cla.fitting import root_of
from kvcal.calibrate.cla.rotation import rotate, rotation_of, unrotate
from kvcal.calibrate.evaluation.standard_errors import mean
from kvcal.calibrate.planning.points import Problem, relative_error
from kvcal.calibrate.pre_rotary import Rotation
from kvcal.kernels.codes import decode, encode, rotation

SIZES = (1, 2, 3, 5)
"""Layers of a group; 1: each layer by itself, in its own basis."""
Code = tuple[tuple[float, int], ...]
"""Shares of a group's coefficients, the most important ones first, and the bits of each."""
HALF: Code = ((1 / 2, 16),)
GRADED: Code = ((1 / 8, 8), (3 / 8, 4), (1 / 2, 2))
SHORT: Code = ((1 / 8, 8), (3 / 8, 4))
CODES: tuple[Code, ...] = (
    *(((rank, bits),) for bits in (16, 8, 4) for rank in (1, 3 / 4, 1 / 2, 3 / 8, 1 / 4, 1 / 8)),
    GRADED,
    ((1 / 4, 8), (1 / 4, 4), (1 / 4, 2)),
    SHORT,
    ((1 / 8, 8), (1 / 4, 4), (1 / 4, 2)),
    ((1 / 8, 8), (1 / 8, 4), (1 / 4, 2)),
)
OWN_BITS = (8, 4, 2)
"""Of a dimension, where each layer keeps its own keys and values."""


@dataclass(frozen=True)
class Basis:
    """Of one KV head, for a group."""

    mean: Tensor
    """[gD]."""
    down: Tensor
    """[gD, gD]: coefficients of a row, the most important ones first."""
    up: Tensor
    """[gD, gD]: and back."""

    def through(self, rows: Tensor, code: Code) -> Tensor:
        """[..., gD] as they come back from their coefficients."""
        back = self.mean.expand(rows.shape)
        for first, end, bits in parts_of(code, len(self.mean)):
            back = back + coded((rows - self.mean) @ self.down[first:end].mT, bits) @ self.up[:, first:end].mT
        return back


def parts_of(code: Code, dims: int) -> list[tuple[int, int, int]]:
    """[(first coefficient, the one after the last, bits)]."""
    found, first = [], 0
    for share, bits in code:
        found.append((first, first + round(share * dims), bits))
        first = found[-1][1]
    return found


def held(code: Code, dims: int) -> float:
    """Bytes of a coded row over those of `dims` 16-bit numbers; a scale for each part that is coded."""
    sizes = ((end - first) * bits / 8 + (2 if bits < 16 else 0) for first, end, bits in parts_of(code, dims))
    return sum(sizes) / (2 * dims)


def fit(rows: Tensor, received: Tensor, metric: Tensor) -> Basis:
    """
    Args:
        rows: [N, gD]; received: [N]; metric: [gD, gD], how much an error in a row weighs.
    """
    weight = (received / received.sum()).unsqueeze(1)
    centre = (weight * rows).sum(0)
    second = (weight * (rows - centre)).mT @ (rows - centre)
    turn, back = root_of(metric)
    basis = torch.linalg.eigh(turn @ second @ turn)[1].flip(1)
    return Basis(centre.float(), (basis.mT @ turn).float(), (back @ basis).float())


def coded(rows: Tensor, bits: int) -> Tensor:
    """Rows as they come back from so many bits a dimension and a 16-bit scale, turned before as `spectral`'s are."""
    if bits == 16:
        return rows.bfloat16().float()
    turn = rotation(rows.shape[-1]).float()
    return decode(*encode(rows @ turn.mT, bits), bits) @ turn


class Reservoir:
    """What the reservoir has of a layer, keys before their rotary embedding."""

    def __init__(self, artifact: Artifact, layer: int, at_sample: Rotation):
        query, key, value = (
            artifact.tensor("reservoir", layer, name).float() for name in ("query_post", "key_post", "value")
        )
        position, scaling = artifact.stages["reservoir"].tensors["position"], artifact.layers[layer].scaling
        self.received = ReadingLayer(query, key, value, position, scaling).received(key).double()
        self.key, self.value = unrotate(key, at_sample).double(), value.double()
        queries = unrotate(query, at_sample).double()
        self.query_second = queries.mT @ queries

    def through(self, key: Tensor, value: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """[B, Hkv, T, D] keys before their rotary embedding, and values, as they come back from so many bits a
        dimension, less their calibrated means."""
        key_mean, value_mean = (rows.mean(1, keepdim=True).float() for rows in (self.key, self.value))
        return coded(key - key_mean, bits) + key_mean, coded(value - value_mean, bits) + value_mean


class Group:
    """The bases of a group of layers, of keys and of values, by KV head."""

    def __init__(self, layers: Sequence[Reservoir]):
        received = torch.stack([layer.received for layer in layers]).sum(0)
        heads, _, self.dims = layers[0].key.shape
        self.key, self.value = [], []
        for head in range(heads):
            metric = torch.block_diag(*(layer.query_second[head] for layer in layers))
            keys = torch.cat([layer.key[head] for layer in layers], 1)
            values = torch.cat([layer.value[head] for layer in layers], 1)
            self.key.append(fit(keys, received, metric))
            self.value.append(fit(values, received, torch.eye(values.shape[1]).double()))

    def through(self, keys: Sequence[Tensor], values: Sequence[Tensor], code: Code) -> list[tuple[Tensor, Tensor]]:
        """Of each layer, its [B, Hkv, T, D] keys before their rotary embedding, and values, as they come back."""
        back = []
        for bases, rows in ((self.key, keys), (self.value, values)):
            by_head = [
                basis.through(torch.cat([row[:, head] for row in rows], -1), code) for head, basis in enumerate(bases)
            ]
            back.append(torch.stack(by_head, 1).split(self.dims, -1))
        return list(zip(*back, strict=True))


class Layer:
    """One layer's problem, keys before their rotary embedding."""

    def __init__(self, problem: Problem, at_row: Rotation):
        self.problem, self.at_row = problem, at_row
        self.key = torch.stack([unrotate(row, at_row) for row in problem.key.float()])
        self.value = problem.value.float()
        self.dense = self.attend(self.key, self.value)

    def attend(self, key: Tensor, value: Tensor) -> Tensor:
        """[B, Hkv, G, steps, Dv] over [B, Hkv, T, D] keys before their rotary embedding."""
        rotated = torch.stack([rotate(row, self.at_row) for row in key])
        query = self.problem.query.float().unflatten(1, (key.shape[1], -1))
        steps, tokens = query.shape[3], key.shape[2]
        logits = self.problem.spec.logits(query @ rotated.unsqueeze(2).mT)
        future = torch.arange(tokens) > torch.arange(tokens - steps, tokens).unsqueeze(1)
        return self.problem.spec.softmax(logits.masked_fill(future, float("-inf"))) @ value.unsqueeze(2)

    def errors(self, key: Tensor, value: Tensor) -> Tensor:
        """[B]: means over heads and steps."""
        return relative_error(self.attend(key, value), self.dense).flatten(1).mean(1)


def rotations(artifact: Artifact, model: Any, tokens: int) -> tuple[Rotation, Rotation]:
    """At the positions of the reservoir, and at the first `tokens`."""
    positions = Stage({"position": torch.arange(tokens), "token": torch.arange(tokens)})
    every = dataclasses.replace(artifact, stages={"reservoir": positions}, data={**artifact.data, "seq_len": tokens})
    at_sample, at_row = rotation_of(artifact, model), rotation_of(every, model)
    assert at_sample is not None and at_row is not None
    return at_sample, at_row


@torch.no_grad()
def shared_basis(found: Sequence[Problem], artifact: Artifact, model: Any) -> list[dict[str, Any]]:
    """Rows of "size" (layers of a group; None: each layer's own keys and values), "code", "bytes" held over those of 16
    bits, and "error" and "error_se" over texts, means of layers."""
    at_sample, at_row = rotations(artifact, model, found[0].key.shape[2])
    layers = [Layer(problem, at_row) for problem in found]
    samples = [Reservoir(artifact, problem.layer, at_sample) for problem in found]
    dims = samples[0].key.shape[2]
    rows = []
    for bits in OWN_BITS:
        of = [
            layer.errors(*sample.through(layer.key, layer.value, bits))
            for layer, sample in zip(layers, samples, strict=True)
        ]
        rows.append(_row(None, ((1, bits),), held(((1, bits),), dims), of))
    for size in SIZES:
        errors: dict[Code, list[Tensor]] = {code: [] for code in CODES}
        for first in range(0, len(layers) // size * size, size):
            group = layers[first : first + size]
            bases = Group(samples[first : first + size])
            for code in CODES:
                back = bases.through([layer.key for layer in group], [layer.value for layer in group], code)
                errors[code] += [layer.errors(*own) for layer, own in zip(group, back, strict=True)]
        for code, of in errors.items():
            rows.append(_row(size, code, held(code, size * dims), of))
    return rows


def _row(size: int | None, code: Code, held_bytes: float, errors: Sequence[Tensor]) -> dict[str, Any]:
    by_text = torch.stack(list(errors)).mean(0).tolist()
    error, error_se = mean(by_text)
    return {"size": size, "code": named(code), "bytes": held_bytes, "error": error, "error_se": error_se}


def named(code: Code) -> str:
    return ", ".join(f"{share:g} in {bits} bits" for share, bits in code)
