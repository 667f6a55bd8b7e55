"""What each setting costs and loses in each layer, measured through the stores that decode."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...artifacts import Artifact
from ...runtime.attention import Logits, probabilities, weighted
from ...runtime.settings import plan
from ...runtime.stores import Store
from ...runtime.stores.full import FullStore
from ..capture import LayerTensors, capture

Setting = dict[str, Any]
"""A method and its parameters: {"method": "spectral", "keep": 0.0625, …}."""


@dataclass(frozen=True)
class Point:
    """One setting in one layer."""

    setting: Setting
    bytes: float
    """Read per step and row, over what dense attention reads of this layer, by a row in a batch of a given size."""
    error: float
    """‖o − o_dense‖ / ‖o_dense‖, mean over the rows of text, heads and steps."""
    loss: float
    """Its mean square, half from rows of text and half from questions: what layers are weighed by. Errors of layers
    add up like independent ones, and a fact that is missed is one large error among many small ones."""
    head_errors: tuple[float, ...]
    """`error` by KV head."""
    text_errors: tuple[float, ...] = ()
    """`error` by row of text."""


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
    logits: Logits
    texts: int
    """The first rows, which are text; the others end in a question and its answer."""

    @torch.no_grad()
    def measure(self, setting: Setting, artifact: Artifact | None, batch_size: int) -> Point:
        """
        Args:
            batch_size: rows that share what is read once per step.

        Raises:
            KvcalError: for what this layer or artifact does not allow.
        """
        store = self.store(setting, artifact)
        prefix = self.prefix
        read, errors = 0.0, []
        for query, key, value, _, dense in self.steps():
            store.append(key, value)
            out = store.attend(query, self.logits)
            shared = store.shared_bytes() if store.bytes_read() else 0
            read += (store.bytes_read() - shared) / self.key.shape[0] + shared / batch_size
            errors.append(relative_error(out, dense).squeeze(-1).unflatten(1, (self.key.shape[1], -1)))
        found = torch.stack(errors, 1).double()  # [B, steps, Hkv, G]
        parts = [part for part in found.split([self.texts, len(found) - self.texts]) if len(part)]
        held = sum(range(prefix + 1, self.key.shape[2] + 1)) * self.key.shape[1]
        dense_read = held * (self.key.shape[3] + self.value.shape[3]) * self.key.element_size()
        return Point(
            setting,
            read / dense_read,
            float(parts[0].mean()),
            sum(float(part.square().mean()) for part in parts) / len(parts),
            tuple(parts[0].mean((0, 1, 3)).tolist()),
            tuple(parts[0].mean((1, 2, 3)).tolist()),
        )

    @property
    def prefix(self) -> int:
        """Tokens before the first that is decoded."""
        return self.key.shape[2] - self.query.shape[2]

    def store(self, setting: Setting, artifact: Artifact | None) -> Store:
        """A method's, after the prefix."""
        method = plan(setting, {}, [self.layer], self.layer + 1)[self.layer]
        store = method.build(self.layer, self.key.shape[3], artifact)()
        full = FullStore()
        full.append(self.key[:, :, : self.prefix], self.value[:, :, : self.prefix])
        store.adopt(full)
        return store

    def steps(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
        """Of each decoded token: query, key, value, and the dense attention's weights [B, Hq, 1, tokens] and output, in
        float32."""
        for at in range(self.prefix, self.key.shape[2]):
            now, held = slice(at, at + 1), slice(0, at + 1)
            query = self.query[:, :, at - self.prefix : at - self.prefix + 1]
            weights = probabilities(query, self.key[:, :, held], self.logits)
            yield query, self.key[:, :, now], self.value[:, :, now], weights, weighted(weights, self.value[:, :, held])


def relative_error(output: Tensor, dense: Tensor) -> Tensor:
    """‖o − o_dense‖ / ‖o_dense‖ of [..., Dv]."""
    return (output.float() - dense).norm(dim=-1) / dense.norm(dim=-1).clamp_min(1e-30)


@torch.no_grad()
def problems(model: Any, ids: Tensor, steps: int, texts: int) -> list[Problem]:
    """Of every full-attention layer, in the memory of the CPU: together they are as large as a cache.

    Args:
        ids: [B, T] int64, without padding.
        steps: tokens at the end that are decoded.
        texts: see `Problem`.
    """
    found: list[Problem] = []

    def observe(seen: LayerTensors) -> None:
        if seen.window is None:
            logits = Logits(seen.scaling, seen.softcap, seen.sinks)
            # Copies: a view would keep all that it is a view of.
            query = seen.query_post[:, :, -steps:].to("cpu", copy=True)
            key, value = (each.to("cpu", copy=True) for each in (seen.key_post, seen.value))
            found.append(Problem(seen.layer, query, key, value, logits, texts))

    with capture(model, observe):
        model(input_ids=ids.to(model.device), use_cache=False, logits_to_keep=1)
    return found


def measure(
    problem: Problem,
    settings: Sequence[Setting],
    artifact: Artifact | None,
    device: torch.device,
    batch_size: int,
    step: Callable[[], None] = lambda: None,
) -> list[Point]:
    """A point of each setting, measured on `device`; `step` is called after each."""
    tensors = {name: getattr(problem, name).to(device) for name in ("query", "key", "value")}
    there, points = dataclasses.replace(problem, **tensors), []
    for setting in settings:
        points.append(there.measure(setting, artifact, batch_size))
        step()
    return points
