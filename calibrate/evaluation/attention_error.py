"""How far a method's attention lies from the dense one, for the same query over the same keys and values."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...runtime.attention import SoftmaxSpec, probabilities, weighted


class History:
    """All keys and values of one layer: those of the prefix, then those of decoded tokens, which can be rewound."""

    def __init__(self, key: Tensor, value: Tensor, steps: int):
        """
        Args:
            key, value: [B, Hkv, P, D | Dv] of the prefix.
            steps: room for decoded tokens.
        """
        self._prefix = self._held = key.shape[2]
        self._key = torch.cat((key, key.new_zeros(*key.shape[:2], steps, key.shape[3])), 2)
        self._value = torch.cat((value, value.new_zeros(*value.shape[:2], steps, value.shape[3])), 2)

    def rewind(self) -> None:
        self._held = self._prefix

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add one token; returns all keys and values, its own included."""
        self._key[:, :, self._held : self._held + 1] = key
        self._value[:, :, self._held : self._held + 1] = value
        self._held += 1
        return self._key[:, :, : self._held], self._value[:, :, : self._held]


class AttentionProbe:
    """To be set as a cache's `observer`: compares each decoded token's attention with the dense one.

    The queries, and the keys and values of decoded tokens, are those of the compressed run, so that a layer's
    error is its own and not what it inherits from the layers below.
    """

    def __init__(self, histories: Mapping[int, History]):
        """
        Args:
            histories: by layer, of rows without padding; rewound here.
        """
        self.seconds = 0.0
        """Spent in the probe so far, and not to be counted as decoding."""
        self._histories = histories
        self._sums: dict[int, list[Tensor]] = {}
        self._steps: dict[int, int] = {}
        for history in histories.values():
            history.rewind()

    @torch.no_grad()
    def __call__(
        self, layer: int, store: Any, query: Tensor, key: Tensor, value: Tensor, spec: SoftmaxSpec, output: Tensor
    ) -> None:
        started = now(query.device)
        keys, values = self._histories[layer].append(key, value)
        weights = probabilities(query, keys, spec)
        dense = weighted(weights, values)
        weights = weights.flatten(1, 2).squeeze(2)
        error = (output.float() - dense).norm(dim=-1) / dense.norm(dim=-1).clamp_min(1e-30)
        read = store.read_mask()
        read = read.repeat_interleave(query.shape[1] // read.shape[1], 1)
        # A model's sink logits take a part of the softmax that no token has.
        mass = (weights * read).sum(-1) / weights.sum(-1)
        by_row = [tensor.double().flatten(1).mean(1) for tensor in (error, mass)]
        self._sums[layer] = [a + b for a, b in zip(self._sums.get(layer, [0, 0]), by_row, strict=True)]
        self._steps[layer] = self._steps.get(layer, 0) + 1
        self.seconds += now(query.device) - started

    def result(self) -> tuple[dict[int, list[float]], dict[int, list[float]]]:
        """By layer and row: mean of ‖o - o_dense‖ / ‖o_dense‖ and of the dense attention mass that was read."""
        means = {layer: [(part / self._steps[layer]).tolist() for part in sums] for layer, sums in self._sums.items()}
        return {layer: part[0] for layer, part in means.items()}, {layer: part[1] for layer, part in means.items()}


def now(device: torch.device) -> float:
    """The clock in seconds, read once the device has finished what was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
