"""What each setting costs and loses in each layer, measured through the stores that decode."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...artifacts import Artifact
from ...runtime.attention import SoftmaxSpec, probabilities, weighted
from ...runtime.methods import METHODS
from ...runtime.methods.base import Method
from ...runtime.settings import methods_by_layer, new_store
from ...runtime.store import Store
from ..capture import LayerTensors, capture
from .prompts import balanced
from .settings import Setting


@dataclass(frozen=True)
class Point:
    """One setting in one layer."""

    setting: Setting
    bytes: float
    """Read per step by a row in a batch of a given size, over what dense attention reads of this layer."""
    error: float
    """‖o − o_dense‖ / ‖o_dense‖, mean over the rows of text, heads and steps."""
    loss: float
    """Mean square of the error, half from rows of text and half from questions: what plans minimise. Errors of layers
    add up like independent ones, and a fact that is missed is one large error among many small ones."""
    head_errors: tuple[float, ...]
    """`error` by KV head."""
    text_errors: tuple[float, ...] = ()
    """`error` by row of text."""


Decoded = tuple[Tensor, Tensor, Tensor, Tensor]
"""A decoded token: query, key, value, and the output of dense attention in float32."""
DENSE = Point({"method": "full"}, 1.0, 0.0, 0.0, ())


@dataclass(frozen=True)
class Problem:
    """The attention of one layer over some rows, the last tokens of which are decoded."""

    layer: int
    query: Tensor
    """[B, Hq, steps, D], of the tokens at the end that are decoded."""
    key: Tensor
    """[B, Hkv, T, D]"""
    value: Tensor
    spec: SoftmaxSpec
    texts: int
    """How many rows, the first ones, are text; the others end in a question and its answer."""

    def measure(self, setting: Setting, artifact: Artifact | None, batch_size: int) -> Point:
        """See `measure_alike`."""
        return self.measure_alike([setting], artifact, batch_size, self.decoded())[0]

    @torch.no_grad()
    def measure_alike(
        self, settings: Sequence[Setting], artifact: Artifact | None, batch_size: int, decoded: Sequence[Decoded]
    ) -> list[Point]:
        """A point of each setting, all through one store: see `alike`.

        Args:
            batch_size: rows that share what is read once per step.
            decoded: of `decoded`.

        Raises:
            KvcalError: for what this layer or artifact does not allow.
        """
        store = self.store(settings[0], artifact)
        policies = (
            [None]
            if len(settings) == 1
            else [self._method(setting).bind(*self._binding(artifact)) for setting in settings]
        )
        read, errors = [0.0] * len(settings), [list[Tensor]() for _ in settings]
        for query, key, value, dense in decoded:
            store.append(key, value)
            for at, policy in enumerate(policies):
                if policy is not None:
                    store.policy = policy
                out = store.attend(query, self.spec)
                shared = store.shared_bytes() if store.bytes_read() else 0
                read[at] += (store.bytes_read() - shared) / self.key.shape[0] + shared / batch_size
                errors[at].append(relative_error(out, dense).squeeze(-1).unflatten(1, (self.key.shape[1], -1)))
        return [
            self._point(setting, bytes_read, torch.stack(by_step, 1).double())
            for setting, bytes_read, by_step in zip(settings, read, errors, strict=True)
        ]

    def _point(self, setting: Setting, read: float, errors: Tensor) -> Point:
        """
        Args:
            read: bytes per row, of all steps.
            errors: [B, steps, Hkv, G].
        """
        held = sum(range(self.prefix + 1, self.key.shape[2] + 1)) * self.key.shape[1]
        dense_read = held * (self.key.shape[3] + self.value.shape[3]) * self.key.element_size()
        text = errors[: self.texts] if self.texts else errors
        return Point(
            setting,
            read / dense_read,
            float(text.mean()),
            balanced(errors.square().mean((1, 2, 3)), self.texts),
            tuple(text.mean((0, 1, 3)).tolist()),
            tuple(text.mean((1, 2, 3)).tolist()),
        )

    @property
    def prefix(self) -> int:
        """Tokens before the first that is decoded."""
        return self.key.shape[2] - self.query.shape[2]

    def store(self, setting: Setting, artifact: Artifact | None) -> Store:
        """A store of the setting's method that holds the prefix."""
        store = new_store(self._method(setting).bind(*self._binding(artifact)))
        store.take(self.key[:, :, : self.prefix], self.value[:, :, : self.prefix])
        return store

    def _method(self, setting: Setting) -> Any:
        return methods_by_layer(setting, {}, [self.layer], self.layer + 1)[self.layer]

    def _binding(self, artifact: Artifact | None) -> tuple[int, int, Artifact | None]:
        """The arguments of `Method.bind`."""
        return self.layer, self.key.shape[3], artifact

    def decoded(self) -> list[Decoded]:
        """`steps` without the weights, which take much memory; computed once for all settings."""
        return [(query, key, value, dense) for query, key, value, _, dense in self.steps()]

    def steps(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
        """Of each decoded token: query, key, value, and the dense attention's weights [B, Hkv, G, 1, tokens] and
        output, in float32."""
        for at in range(self.prefix, self.key.shape[2]):
            now, held = slice(at, at + 1), slice(0, at + 1)
            query = self.query[:, :, at - self.prefix : at - self.prefix + 1]
            weights = probabilities(query, self.key[:, :, held], self.spec)
            yield query, self.key[:, :, now], self.value[:, :, now], weights, weighted(weights, self.value[:, :, held])


def relative_error(output: Tensor, dense: Tensor) -> Tensor:
    """‖o − o_dense‖ / ‖o_dense‖ of [..., Dv]."""
    return (output.float() - dense).norm(dim=-1) / dense.norm(dim=-1).clamp_min(1e-30)


@torch.no_grad()
def problems(model: Any, ids: Tensor, steps: int, texts: int) -> list[Problem]:
    """The problem of every full-attention layer, in the memory of the CPU: together they are as large as a cache.

    Args:
        ids: [B, T] int64, without padding.
        steps: tokens at the end that are decoded.
        texts: see `Problem`.
    """
    found: list[Problem] = []

    def observe(seen: LayerTensors) -> None:
        if seen.window is None:
            spec = SoftmaxSpec(seen.scaling, seen.softcap, seen.sink_logits)
            # Copies: a view would keep the whole tensor in memory.
            query = seen.query_post[:, :, -steps:].to("cpu", copy=True)
            key, value = (tensor.to("cpu", copy=True) for tensor in (seen.key_post, seen.value))
            found.append(Problem(seen.layer, query, key, value, spec, texts))

    with capture(model, observe):
        model(input_ids=ids.to(model.device), use_cache=False, logits_to_keep=1)
    return found


def measure(
    problem: Problem,
    settings: Sequence[Setting],
    artifact: Artifact | None,
    device: torch.device,
    batch_size: int,
) -> list[Point]:
    """A point of each setting, measured on `device`."""
    tensors = {name: getattr(problem, name).to(device) for name in ("query", "key", "value")}
    on_device = dataclasses.replace(problem, **tensors)
    decoded, points = on_device.decoded(), dict[int, Point]()
    for group in alike(settings):
        found = on_device.measure_alike([settings[at] for at in group], artifact, batch_size, decoded)
        points |= dict(zip(group, found, strict=True))
    return [points[at] for at in range(len(settings))]


def alike(settings: Sequence[Setting]) -> list[list[int]]:
    """Indices of settings that can decode through one store: those of policies that differ in `keep` alone, since what
    is kept of a token does not depend on how many are read."""
    groups: dict[Any, list[int]] = {}
    for at, setting in enumerate(settings):
        method = METHODS[setting["method"]]
        shares = issubclass(method, Method) and not method.keep_shapes_cache
        without_keep = {name: value for name, value in setting.items() if name != "keep"}
        groups.setdefault(json.dumps(without_keep, sort_keys=True) if shares else at, []).append(at)
    return list(groups.values())
