"""What a method reads at least: known from the shapes of its cache, before anything is measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ...artifacts import Artifact, KvcalError
from ...runtime.attention import SoftmaxSpec
from .points import Problem, measure
from .settings import grid

SLACK = 1.02
"""Factor of tolerance: where a sample decides which tokens are read, their number depends a little on the text."""


@dataclass(frozen=True)
class Floor:
    """The least share of dense attention's bytes: `share` + `fixed` / tokens."""

    share: float
    """What grows with the sequence: codes or centroids, and the tokens that are kept."""
    fixed: float
    """What is read once per step: maps, codewords, first and last tokens."""

    def of(self, tokens: int) -> float:
        return self.share + self.fixed / tokens

    def tokens(self, budget: float) -> int | None:
        """The number of tokens from which on the budget suffices; None: it never does."""
        room = budget / SLACK - self.share
        return None if room <= 0 else max(1, math.ceil(self.fixed / room))


def floor(artifact: Artifact, method: str, tokens: int, batch_size: int, dtype: torch.dtype) -> Floor:
    """Measured in stores of random tokens, of two lengths.

    Args:
        tokens: of the sequences.
        batch_size: rows that share what is read once per step.
    """
    near, far = (_least(artifact, method, count, batch_size, dtype) for count in (tokens, 2 * tokens))
    return Floor(2 * far - near, max(0.0, 2 * tokens * (near - far)))


def check(floor: Floor, budget: float, prefix: int, batch_size: int, method: str, most: int | None) -> None:
    """Raise KvcalError for a budget below what the cheapest settings read.

    Args:
        most: the model's context.
    """
    least = floor.of(prefix)
    if budget >= SLACK * least:
        return
    enough, longer = math.ceil(1e4 * SLACK * least) / 1e4, floor.tokens(budget)
    needed = None if longer is None else -(-longer // 64) * 64
    or_prefix = "" if needed is None or (most is not None and needed > most) else f" or --prefix {needed},"
    raise KvcalError(
        f"--bytes {budget:g}: the cheapest settings of {method} read {least:.4f} of dense attention's bytes after "
        f"{prefix} tokens, in batches of {batch_size}: give --bytes {enough:g}{or_prefix} or more"
    )


def _least(artifact: Artifact, method: str, tokens: int, batch_size: int, dtype: torch.dtype) -> float:
    layer = artifact.full_layers[0]  # all of them read the same
    draw, count = torch.Generator().manual_seed(0), tokens + 1
    query, key, value = (
        torch.randn(1, heads, length, dims, generator=draw).to(dtype)
        for heads, length, dims in (
            (layer.query_heads, 1, layer.head_dim),
            (layer.kv_heads, count, layer.head_dim),
            (layer.kv_heads, count, layer.value_dim),
        )
    )
    problem = Problem(layer.index, query, key, value, SoftmaxSpec(layer.scaling), 1)
    settings = grid(method, layer.head_dim)
    least = min(setting["keep"] for setting in settings)
    cheap = [setting for setting in settings if setting["keep"] == least]
    return min(point.bytes for point in measure(problem, cheap, artifact, torch.device("cpu"), batch_size))
