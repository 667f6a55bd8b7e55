"""Measure pairs of layers of an artifact: how alike they are, and what it costs one to read the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

import torch
from torch import Tensor

from ...artifacts import Artifact, Layer
from ..pre_rotary import Rotation
from .cost import ReadingLayer
from .likeness import Source
from .rotation import rotate, unrotate

MEASURES = ("key_r2", "key_r2_unaligned", "value_r2", "value_r2_unaligned", "cost_as_is", "cost_aligned")

Pair = tuple[int, int]
"""(storing layer, reading layer)."""


def can_share(first: Layer, second: Layer) -> bool:
    """Whether the shapes of two layers, their windows, and whether they rotate allow one to read the other."""
    kinds = [(layer.kv_heads, layer.head_dim, layer.value_dim, layer.pre_rotary) for layer in (first, second)]
    return kinds[0] == kinds[1] and first.window is None and second.window is None


def measure_pairs(
    artifact: Artifact,
    pairs: Collection[Pair],
    rotation: Rotation | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """For every measure [L, L] float64, [b, a] for layer b reading layer a; NaN for pairs not asked for.

    `key_r2` and `value_r2` are `Likeness.r2`, the keys before their rotary embedding where `rotation` gives it;
    `cost_as_is` is `ReadingLayer.error` with the storing layer's keys and values, `cost_aligned` with the best linear
    alignment of them, held out: about what is left where uptraining makes up for all that a linear map can. The maps
    are the best for keys and values, not for the output. Queries and output projections can absorb the part of a map
    that acts within a head and commutes with the rotation; the retrained shared projections have to do the rest, for
    all layers of a group at once.

    Per pair O(N (Hkv D)²) for the alignments, and two passes of `ReadingLayer`: about 5 seconds on one core for
    4096 tokens, 8 KV heads and head dim 128; 32 layers have 90 pairs in groups of at most four. In memory are one
    layer's decompositions, at most 2 N Hkv (D + Dv) numbers, and a few tensors of its size.
    """
    found = {name: torch.full((len(artifact.layers),) * 2, math.nan, dtype=torch.float64) for name in MEASURES}
    position = artifact.stages["reservoir"].tensors["position"]
    total = len(pairs)
    done = 0
    readers: dict[int, ReadingLayer] = {}
    if progress:
        progress(0, total)
    for storing in sorted({storing for storing, _ in pairs}):
        key, value = (artifact.tensor("reservoir", storing, name).float() for name in ("key_post", "value"))
        keys = Source(before_rotary(key, artifact.layers[storing], rotation))
        values = Source(value)
        for reading in sorted(reader for source, reader in pairs if source == storing):
            layer = artifact.layers[reading]
            own_query, own_key, own_value = (
                artifact.tensor("reservoir", reading, name).float() for name in ("query_post", "key_post", "value")
            )
            of_keys = keys.predict(before_rotary(own_key, layer, rotation))
            of_values = values.predict(own_value)
            if reading not in readers:
                readers[reading] = ReadingLayer(own_query, own_key, own_value, position, layer.scaling)
            reader = readers[reading]
            measured = {
                "key_r2": of_keys.r2,
                "key_r2_unaligned": of_keys.r2_unaligned,
                "value_r2": of_values.r2,
                "value_r2_unaligned": of_values.r2_unaligned,
                "cost_as_is": reader.error(key, value),
                "cost_aligned": reader.error(after_rotary(of_keys.predicted, layer, rotation), of_values.predicted),
            }
            for name, number in measured.items():
                found[name][reading, storing] = number
            done += 1
            if progress:
                progress(done, total)
        readers = {layer: reader for layer, reader in readers.items() if layer > storing + 1}
    return found


def rotates_back(layer: Layer, rotation: Rotation | None) -> bool:
    """Whether the layer's sampled keys can be seen before their rotary embedding (or have none)."""
    return layer.pre_rotary == "none" or (rotation is not None and layer.pre_rotary == "unrotate")


def before_rotary(key: Tensor, layer: Layer, rotation: Rotation | None) -> Tensor:
    return unrotate(key, rotation) if rotation is not None and layer.pre_rotary == "unrotate" else key


def after_rotary(key: Tensor, layer: Layer, rotation: Rotation | None) -> Tensor:
    return rotate(key, rotation) if rotation is not None and layer.pre_rotary == "unrotate" else key
