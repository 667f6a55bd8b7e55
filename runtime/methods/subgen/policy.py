"""SubGen (Zandieh et al., 2024): the first and the most recent tokens, and a sketch of all others.

A token that leaves the window enters the sketch once and is then gone: memory grows with the number of clusters of the
keys, not with the number of tokens. As with the other methods that evict, this begins at the first decoded token.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from ....artifacts import Artifact
from ...attention import SoftmaxSpec
from ...kv.pages import POSITION, LayerCache
from ..amounts import Budget, check_choice, check_count, check_number
from ..base import Attended, Method, Reading
from ..evicting import ByAge
from .attention import attention_with_sketch
from .sketch import Shape, Sketch

MOST_LAYERS = 1 << 16
"""No two pairs of seed and layer draw the same numbers, in models of up to so many layers."""
MOST_SAMPLES = 1 << 16
"""Per KV head and of each kind: room for all samples is made at once."""


@dataclass(frozen=True)
class SubGen(Method):
    keeps_all_tokens = False
    window: int = 288
    """Most recent tokens, the new one included, that stay exact. With three quarters of what is held, SmolLM2-135M
    likely loses less than with a half (docs/results/real.md)."""
    sinks: int = 4
    """First tokens that stay exact."""
    clusters: int = 64
    """Most clusters per KV head: when there is one more, delta grows and clusters merge."""
    growth: float = 1.1
    """Factor on delta then. With the doubling of the literature (2.0) many heads are left with a single cluster:
    distances between keys of many dimensions differ too little (docs/results/real.md)."""
    delta: float | None = None
    """A key farther than this from all representatives opens a cluster. None: by KV head the radius that `clusters`
    balls needed on the calibration keys (stage `clusters`), or, without that stage, the smallest distance between two
    clusters when there is one too many for the first time."""
    t: int = 4
    """Uniform samples of keys per cluster."""
    s: int = 96
    """Samples of (key, value), in proportion to the squared norm of the value."""
    normaliser: str = "values"
    """"clusters": the paper's. "values" (ours): from the `s` samples that the numerator has, and no clusters are kept:
    two estimates that err alike leave less error in their ratio (docs/results/real.md)."""
    seed: int = 0
    dense_below: int = 0
    """Sequences of fewer tokens lose none."""

    def not_captured(self) -> str | None:
        return "what leaves its window enters a sketch, whose clusters are counted on the host"

    def bind(self, layer: int, head_dim: int, artifact: Artifact | None) -> SubGenPolicy:
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
        # Every layer draws its own numbers, whatever the seed.
        seed = self.seed * MOST_LAYERS + layer
        return SubGenPolicy(dataclasses.replace(self, seed=seed), self._radius(layer, artifact))

    def _radius(self, layer: int, artifact: Artifact | None) -> Tensor | float | None:
        """The initial delta: [Hkv], or one for all heads; None: the first keys give it."""
        if self.delta is not None:
            return float(self.delta)
        if artifact is None or "clusters" not in artifact.stages:
            return None
        counts, radius = (artifact.tensor("clusters", layer, f"curve.{name}") for name in ("counts", "radius"))
        return radius[:, (counts - self.clusters).abs().argmin()]


class SubGenPolicy(ByAge):
    name = "subgen"

    def __init__(self, settings: SubGen, delta: Tensor | float | None):
        super().__init__(Budget(settings.sinks + settings.window, settings.dense_below), settings.sinks)
        self.settings, self.delta = settings, delta

    def sequence_index(self) -> Sketch:
        settings = self.settings
        clusters = settings.clusters if settings.normaliser == "clusters" else 0
        return Sketch(Shape(clusters, settings.growth, settings.t, settings.s, settings.seed), self.delta)

    def step(self, query: Tensor, cache: LayerCache, spec: SoftmaxSpec) -> Attended:
        sketch = _sketch(cache)
        if not sketch.parts:
            return super().step(query, cache, spec)
        limits = cache.metadata.seq_lens.long().unsqueeze(1)
        return Attended(attention_with_sketch(query, *self.keys_values(cache), sketch.parts, spec, limits), None)

    def attend_all(self, query: Tensor, cache: LayerCache, spec: SoftmaxSpec, limits: Tensor | None) -> Tensor:
        sketch = _sketch(cache)
        if not sketch.parts:
            return super().attend_all(query, cache, spec, limits)
        if limits is None:
            limits = torch.arange(1, query.shape[2] + 1, device=query.device).expand(len(query), -1)
        return attention_with_sketch(query, *self.keys_values(cache), sketch.parts, spec, limits)

    def on_evict(self, cache: LayerCache, slot: Tensor, gone: Tensor) -> None:
        """Adds the tokens to the sketch, a block at a time. All KV heads lose the same tokens."""
        if not bool(gone.any()):
            return
        sketch = _sketch(cache)
        block = sketch.block(cache.tokens("key"))
        for part, taken in zip(slot.split(block, 2), gone.split(block, 2), strict=True):
            key, value, position = (_gather(cache, name, part) for name in ("key", "value", POSITION))
            sketch.add(key, value, position[:, 0, :, 0].long(), taken[:, 0])

    def dense_bytes(self, reading: Reading) -> int:
        """Also the sketch, with all representatives: a token that enters it is compared with each."""
        widths, held = reading.widths, super().dense_bytes(reading)
        if "sketch.mass" not in widths:
            return held
        sequence = self.settings.s * (widths["sketch.value_key"] + widths["sketch.value"]) + 8  # and Σ‖v‖²
        if "sketch.sample" not in widths:
            return held + len(reading.metadata.seq_lens) * reading.heads * sequence
        sequence += 8 + 8  # how many clusters there are, and delta
        cluster = self.settings.t * widths["sketch.sample"] + widths["sketch.representative"] + 4  # its count
        return held + reading.heads * (len(reading.metadata.seq_lens) * sequence + reading.entries * cluster)


def _sketch(cache: LayerCache) -> Sketch:
    assert isinstance(cache.sequence_index, Sketch)
    return cache.sequence_index


def _gather(cache: LayerCache, name: str, slot: Tensor) -> Tensor:
    """[B, Hkv, m, …]: the token buffer `name` at slots [B, Hkv, m]."""
    tokens = cache.tokens(name)
    return tokens.gather(2, slot.unsqueeze(-1).expand(-1, -1, -1, tokens.shape[3]))
