"""The stage `codebook`: what `spectral` decodes with, of every layer with full attention, from the reservoir."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..artifacts import Artifact, KvcalError, Layer, Stage
from .codebook import fit_code_basis, fit_codebook, spread_of, unexplained
from .distributed import SINGLE, World
from .moments import Moments

CODEWORDS = 64
TOKENS_PER_CODEWORD = 8
"""A sample has at least so many of them, or there are fewer codewords."""
SIZES = (16, 64, 256)
"""Of the codebooks by which is reported how well they carry over to other text."""


def codebook(
    artifact: Artifact,
    *,
    codewords: int | None = None,
    iterations: int = 20,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    world: World = SINGLE,
) -> Artifact:
    """Fit a codebook of the sampled keys and values per (layer, KV head), and the basis of what it leaves of keys.

    Args:
        codewords: at most 256; by default 64, or what the sample allows.
        progress: called with (layers done, layers in all), of this rank's share.
        world: the processes that share the layers.

    Returns:
        The artifact with the stage `codebook`, the same on every rank.

    Raises:
        KvcalError: no sample, more codewords than it has tokens or than a byte counts, no layer with full attention.
    """
    tokens = len(artifact.stages["reservoir"].tensors["token"]) if "reservoir" in artifact.stages else 0
    layers = [layer for layer in artifact.layers_in("reservoir") if layer.window is None] if tokens else []
    if not layers:
        missing = "all layers have a sliding window" if tokens else "no reservoir: calibrate again with `calibrate pca`"
        raise KvcalError(f"{artifact.name}: {missing}: there is nothing to make a codebook of")
    count = usual_codewords(artifact) if codewords is None else codewords
    if count > max(SIZES):
        raise KvcalError(f"{count} codewords: a token names its codeword in one byte: give at most {max(SIZES)}")
    mine = [layers[index] for index in world.deal(len(layers))]
    found: dict[str, Tensor] = {}
    for done, layer in enumerate(mine):
        if progress:
            progress(done, len(mine))
        world.check()
        tensors = _of_layer(artifact, layer, count, iterations, seed)
        found |= {f"layers.{layer.index}.{name}": tensor for name, tensor in tensors.items()}
    if progress:
        progress(len(mine), len(mine))
    everyone: dict[str, Tensor] = {}
    for rank in range(world.size):
        everyone |= world.broadcast(None, found, rank)[1]
    settings = {"codewords": count, "iterations": iterations, "seed": seed}
    return artifact.with_stage("codebook", Stage(everyone, settings))


def usual_codewords(artifact: Artifact) -> int:
    """64, or what the sample allows."""
    tokens = len(artifact.stages["reservoir"].tensors["token"])
    return max(1, min(CODEWORDS, tokens // TOKENS_PER_CODEWORD))


def _of_layer(artifact: Artifact, layer: Layer, codewords: int, iterations: int, seed: int) -> dict[str, Tensor]:
    where = f"layer {layer.index} of {artifact.name}"
    key, value = (artifact.tensor("reservoir", layer.index, name).float() for name in ("key_post", "value"))
    settings: dict[str, Any] = {"iterations": iterations, "seed": seed, "where": where}
    spread = spread_of(*(artifact.tensor("moments", layer.index, f"{of}.covariance") for of in ("key_post", "value")))
    found = fit_codebook(key, value, spread, codewords=codewords, **settings)
    basis = fit_code_basis(found, query_moments(artifact, layer), key, value)
    half = key.shape[1] // 2
    seen, unseen = (key[:, :half], value[:, :half]), (key[:, half:], value[:, half:])
    sizes = [size for size in SIZES if size * TOKENS_PER_CODEWORD <= half] or [1]
    carried = []
    for size in sizes:
        fitted = fit_codebook(*seen, spread, codewords=size, **settings)
        carried.append([*unexplained(fitted, *seen), *unexplained(fitted, *unseen)])
    columns = [torch.stack(column, -1) for column in zip(*carried, strict=True)]
    names = ("key_fitted", "value_fitted", "key_unseen", "value_unseen")
    return {
        "key": found.key,
        "value": found.value,
        "spread": found.spread,
        "sizes": found.sizes,
        "code.query_map": basis.query_map.float(),
        "code.key_map": basis.key_map.float(),
        "code.singular_values": basis.singular_values,
        "carry.sizes": torch.tensor(sizes),
        **{f"carry.{name}": column for name, column in zip(names, columns, strict=True)},
    }


def query_moments(artifact: Artifact, layer: Layer) -> Moments:
    """Of queries after the rotary embedding."""
    count, mean, covariance = (
        artifact.tensor("moments", layer.index, f"query_post.{part}") for part in ("count", "mean", "covariance")
    )
    return Moments(int(count), mean, covariance)


def codebook_report(artifact: Artifact) -> dict[str, Any]:
    """How well codebooks carry over, by size: what they leave of the variance of keys and values, mean over KV heads,
    of the half of the sample that they were fitted to and of the other.

    Returns:
        {"settings", "layers": [{"layer", "largest", "smallest", "carry": [{"codewords", "key_fitted", "key_unseen",
        "value_fitted", "value_unseen"}]}]}
    """
    layers = []
    for layer in artifact.layers_in("codebook"):
        sizes = artifact.tensor("codebook", layer.index, "sizes")
        names = ("key_fitted", "key_unseen", "value_fitted", "value_unseen")
        columns = {name: artifact.tensor("codebook", layer.index, f"carry.{name}").mean(0).tolist() for name in names}
        tried = artifact.tensor("codebook", layer.index, "carry.sizes").tolist()
        layers.append(
            {
                "layer": layer.index,
                "largest": int(sizes.max()),
                "smallest": int(sizes.min()),
                "carry": [
                    {"codewords": size, **{name: columns[name][at] for name in names}} for at, size in enumerate(tried)
                ],
            }
        )
    return {"settings": dict(artifact.stages["codebook"].settings), "layers": layers}
