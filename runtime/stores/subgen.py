"""SubGen (Zandieh et al., 2024): the first and the most recent tokens, and a sketch of all others.

What leaves the window enters the sketch once and is then gone: memory grows with the number of clusters of the keys,
not with the number of tokens. Like the other methods that forget, it begins at the first decoded token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...artifacts import Artifact
from ..attention import Logits, attention, causal_attention
from ..kv.buffers import lengths_mask
from ..kv.saved import Saved
from ..methods.amounts import check_choice, check_count, check_number
from .saved_sketch import check_sketch
from .sketch import Shape, Sketch
from .sketch_attention import READ, attention_with_sketch
from .window import WindowStore

MOST_LAYERS = 1 << 16
MOST_SAMPLES = 1 << 16
"""Of each kind, per KV head: room for all of them is made at once."""
BLOCK = 256
"""Tokens that enter the sketch at once, at most."""
_NUMBERS = 1 << 23
"""Random numbers and distances at a time."""


@dataclass(frozen=True)
class SubGen:
    window: int = 128
    """Most recent tokens, the new one included, that are exact."""
    sinks: int = 4
    """First tokens that stay exact."""
    clusters: int = 64
    """Most clusters per KV head: when there is one more, delta grows and clusters merge."""
    growth: float = 1.1
    """Factor on delta then. With the doubling of the literature (2.0) many heads are left with a single cluster:
    distances between keys of many dimensions differ too little (docs/results/subgen.json)."""
    delta: float | None = None
    """A key farther than this from all representatives opens a cluster. None: by KV head the radius that `clusters`
    balls needed on the calibration keys (stage `clusters`), or else, from the first keys on, the smallest distance
    of two clusters when there is first one too many."""
    t: int = 4
    """Uniform samples of keys per cluster."""
    s: int = 256
    """Samples of (key, value), in proportion to the squared norm of the value."""
    normaliser: str = "values"
    """"clusters": the paper's. "values" (ours): from the `s` samples that the numerator has, and no clusters are kept:
    two estimates that err alike leave less error in their ratio (docs/results/real.md)."""
    seed: int = 0
    dense_below: int = 0
    """Rows of fewer tokens lose none."""

    def build(self, layer: int, head_dim: int, artifact: Artifact | None) -> Callable[[], SubGenStore]:
        check_count("window", self.window, 1)
        for name in ("clusters", "t", "s"):
            check_count(name, getattr(self, name), 1, MOST_SAMPLES)
        for name in ("sinks", "dense_below"):
            check_count(name, getattr(self, name))
        check_count("seed", self.seed, 0, 2**63 - 1)
        check_choice("normaliser", self.normaliser, ("clusters", "values"))
        check_number("growth", self.growth, 1.01, 1e6, "a factor")
        if self.delta is not None:
            check_number("delta", self.delta, 1e-30, 1e30, "a distance, or None for the calibrated one,")
        delta = self._radius(layer, artifact)
        # Every layer draws its own numbers, whatever the seed.
        own = dataclasses.replace(self, seed=self.seed * MOST_LAYERS + layer)
        return lambda: SubGenStore(own, delta)

    def _radius(self, layer: int, artifact: Artifact | None) -> Tensor | float | None:
        """[Hkv], or one for all heads, or None for what the keys themselves give."""
        if self.delta is not None:
            return float(self.delta)
        if artifact is None or "clusters" not in artifact.stages:
            return None
        counts, radius = (artifact.tensor("clusters", layer, f"curve.{name}") for name in ("counts", "radius"))
        return radius[:, (counts - self.clusters).abs().argmin()]


class SubGenStore(WindowStore):
    """`totals` holds the tensors of the sketch."""

    def __init__(self, settings: SubGen, delta: Tensor | float | None):
        super().__init__("subgen", settings.sinks, settings.window, settings.dense_below)
        self.settings, self.delta = settings, delta
        self._streamed = False

    def prefill(self, query: Tensor, key: Tensor, value: Tensor, logits: Logits, valid: Tensor | None = None) -> Tensor:
        limits = self._take(key, value, valid)
        held_key, held_value = self.rows["key"].view, self.rows["value"].view
        if limits is None or not any(self.left):
            return causal_attention(query, held_key, held_value, logits, limits)
        return attention_with_sketch(query, held_key, held_value, self.totals, logits, limits)

    def _append(self, key: Tensor, value: Tensor, valid: Tensor | None) -> None:
        self._streamed = False
        super()._append(key, value, valid)

    def attend(self, query: Tensor, logits: Logits) -> Tensor:
        key, value = self.rows["key"].view, self.rows["value"].view
        self._read = key.nbytes + value.nbytes
        if not any(self.left):
            return attention(query, key, value, logits, lengths_mask(self.held, key.device))
        # A token that has just entered the sketch was compared with all representatives.
        names = (*READ, "representative", "delta") if self._streamed else READ
        self._read += sum(self.totals[name].nbytes for name in names if name in self.totals)
        limits = torch.tensor(self.held, device=key.device).unsqueeze(1)
        return attention_with_sketch(query, key, value, self.totals, logits, limits)

    def _leave(self, key: Tensor, value: Tensor, position: Tensor, there: Tensor) -> None:
        settings = self.settings
        sketch = Sketch(self.totals, Shape(self._clusters, settings.growth, settings.t, settings.s, settings.seed))
        if not self.totals:
            delta = torch.full((key.shape[1],), self.delta) if isinstance(self.delta, float) else self.delta
            sketch.begin(key, value, delta)
        sketch.add(key, value, position, there)
        self._streamed = True

    def _check_left(self, saved: Saved, left: list[int]) -> None:
        if any(left) or saved.has("totals.mass"):
            settings = self.settings
            shape = Shape(self._clusters, settings.growth, settings.t, settings.s, settings.seed)
            check_sketch(saved, shape, left)

    @property
    def _clusters(self) -> int:
        return self.settings.clusters if self.settings.normaliser == "clusters" else 0

    def _block(self, key: Tensor) -> int:
        settings = self.settings
        each = key.shape[0] * key.shape[1] * max(settings.s, settings.clusters, settings.t, key.shape[3])
        return max(1, min(BLOCK, _NUMBERS // each))
