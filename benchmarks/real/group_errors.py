"""Attention errors where layers of a group keep tokens layer by layer, as `xcla` does, or in one basis for all of them:
the same bits by the same rule. A simulation: every key and value is what comes back from its code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kvcal.artifacts import Artifact
from kvcal.calibrate.cla.group_fit import Fit, Rows, fit_group
from kvcal.calibrate.cla.group_sample import GroupSample
from kvcal.calibrate.cla.rotation import angles_of
from kvcal.calibrate.cla.xcla import groups_of
from kvcal.calibrate.evaluation.standard_errors import mean
from kvcal.calibrate.planning.points import Problem
from kvcal.runtime.cla.group_code import KINDS, RowCode, code_bytes

from .shared_basis import Layer, rotations

SIZES = (1, 3)
MEMORIES = (0.17,)
HALVINGS = 10
Code = Callable[[Sequence[Tensor]], list[Tensor]]
"""From rows [B, Hkv, T, D] of each layer of a group to the same as they come back."""


class Sampled(GroupSample):
    """With one basis for the group, too."""

    def fit_as_one(self, level: float) -> dict[str, Fit]:
        """Of "key" and "value": a code of the rows of all layers side by side."""
        found = {}
        for kind in KINDS:
            layers = self._rows(kind)
            metric = torch.stack([torch.block_diag(*head) for head in zip(*(of.metric for of in layers), strict=True)])
            joint = Rows(torch.cat([of.rows for of in layers], -1), metric)
            found[kind] = fit_group([joint], self._weight, level)[0]
        return found


def group_errors(found: Sequence[Problem], artifact: Artifact, model: Any) -> list[dict[str, Any]]:
    """Rows of "size", "way" ("layer by layer" or "one basis"), "memory" over that of 16 bits, "read" (the same, of what
    a step reads), and "error" and "error_se" over texts, means of layers."""
    _, at_row = rotations(artifact, model, found[0].key.shape[2])
    layers, angles, rows = [Layer(problem, at_row) for problem in found], angles_of(artifact, model), []
    for size in SIZES:
        groups = [[layer.index for layer in group] for group in groups_of(artifact, size)]
        sampled = [Sampled(artifact, group, angles) for group in groups_of(artifact, size)]
        for way in ("layer by layer", "one basis") if size > 1 else ("layer by layer",):
            for memory in MEMORIES:
                codes, taken, read = _within(memory, sampled, groups, way, layers)
                errors = [
                    error for group, code in zip(groups, codes, strict=True) for error in errors_of(layers, group, code)
                ]
                error, error_se = mean(torch.stack(errors).mean(0).tolist())
                rows.append(
                    {"size": size, "way": way, "memory": taken, "read": read, "error": error, "error_se": error_se}
                )
    return rows


def _within(
    memory: float, sampled: Sequence[Sampled], groups: Sequence[Sequence[int]], way: str, layers: Sequence[Layer]
) -> tuple[list[dict[str, Code]], float, float]:
    """(code of "key" and "value" of each group, memory, bytes read over those of 16 bits)."""
    full = sum(2 * (layer.key.shape[-1] + layer.value.shape[-1]) for layer in layers)
    least, most, best = -6.0, 1.0, None
    for _ in range(HALVINGS):
        middle = (least + most) / 2
        codes, taken, read = [], 0, 0
        for group, sample in zip(groups, sampled, strict=True):
            if way == "one basis":
                as_one = sample.fit_as_one(10**middle)
                sizes = [sum(code_bytes(fit.code.counts) for fit in as_one.values())]
                codes.append({kind: _as_one(as_one[kind]) for kind in KINDS})
                read += len(group) * sizes[0]
            else:
                fits = sample.fit(10**middle)
                sizes = [sum(code_bytes(fit.code.counts) for fit in fits[layer].values()) for layer in group]
                codes.append({kind: by_layer([fits[layer][kind].code for layer in group]) for kind in KINDS})
                read += sum(sum(sizes[: at + 1]) for at in range(len(group)))
            taken += sum(sizes)
        if taken <= memory * full:
            best, most = (codes, taken / full, read / full), middle
        else:
            least = middle
    assert best is not None, f"no codes take as little as {memory}"
    return best


def _as_one(fit: Fit) -> Code:
    def through(rows: Sequence[Tensor]) -> list[Tensor]:
        joint = torch.cat(list(rows), -1)
        coefficients = fit.code.coefficients(*fit.code.encode(joint, joint[..., :0]))
        return list(fit.code.restore(coefficients).split(rows[0].shape[-1], -1))

    return through


def by_layer(codes: Sequence[RowCode]) -> Code:
    """Of one kind, the group's layers in their order."""

    def through(rows: Sequence[Tensor]) -> list[Tensor]:
        told, back = rows[0][..., :0], []
        for code, own in zip(codes, rows, strict=True):
            told = torch.cat((told, code.coefficients(*code.encode(own, told))), -1)
            back.append(code.restore(told))
        return back

    return through


def errors_of(layers: Sequence[Layer], group: Sequence[int], codes: dict[str, Code]) -> list[Tensor]:
    """[B] of each layer of a group."""
    keys, values = (codes[kind]([getattr(layers[layer], kind) for layer in group]) for kind in KINDS)
    return [layers[layer].errors(key, value) for layer, key, value in zip(group, keys, values, strict=True)]
