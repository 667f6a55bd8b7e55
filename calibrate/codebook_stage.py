"""The stage `codebook`, with which `spectral` decodes: fitted to the reservoir, for every layer with full attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..artifacts import Artifact, KvcalError, Layer, Stage
from ..artifacts.cluster_values import MOST_CODEWORDS
from .clustering import one_thread
from .codebook import fit_code_basis, fit_codebook, spread_of, unexplained
from .distributed import SINGLE, World
from .moments import Moments
from .reservoir import sampled_tokens

CODEWORDS = 64
TOKENS_PER_CODEWORD = 8
"""Sampled tokens per codeword at least: a small sample has fewer codewords."""
SIZES = (16, 64, 256)
"""Sizes, beside the chosen one, of the codebooks that show how well codebooks carry over to other text."""


def codebook(
    artifact: Artifact,
    *,
    codewords: int | None = None,
    tokens_per_codeword: int | None = None,
    iterations: int = 20,
    seed: int = 0,
    report: bool = True,
    progress: Callable[[int, int], None] | None = None,
    world: World = SINGLE,
) -> Artifact:
    """Fit a codebook of the sampled keys and values per (layer, KV head), and the basis of keys less their codewords.

    Args:
        codewords: at most 256; by default one per `tokens_per_codeword` sampled tokens; without that 64, or as many as
            the sample allows.
        report: also fit codebooks of several sizes to half of the sample, to see how well they carry over to the other.
        progress: called with (layers done, layers in all), of this rank's share.
        world: the processes that share the layers.

    Returns:
        The artifact with the stage `codebook`, the same on every rank.

    Raises:
        KvcalError: no sample, more codewords than it has tokens or than a byte counts, no layer with full attention.
    """
    artifact.require("reservoir", "moments")
    tokens = sampled_tokens(artifact)
    layers = [layer for layer in artifact.layers_in("reservoir") if layer.window is None]
    if not layers:
        raise KvcalError(f"{artifact.name}: all layers have a sliding window: there is nothing to make a codebook of")
    if codewords is None:
        codewords = max(1, round(tokens / tokens_per_codeword)) if tokens_per_codeword else usual_codewords(tokens)
    if codewords > MOST_CODEWORDS:
        raise KvcalError(
            f"{codewords} codewords: a token names its codeword in one byte: give at most {MOST_CODEWORDS}"
        )
    mine = [layers[index] for index in world.deal(len(layers))]
    found: dict[str, Tensor] = {}
    settings = {"codewords": codewords, "iterations": iterations, "seed": seed}
    for done, layer in enumerate(mine):
        if progress:
            progress(done, len(mine))
        world.check()
        with one_thread():
            tensors = _of_layer(artifact, layer, report, **settings)
        found |= {f"layers.{layer.index}.{name}": tensor for name, tensor in tensors.items()}
    if progress:
        progress(len(mine), len(mine))
    gathered: dict[str, Tensor] = {}
    for rank in range(world.size):
        gathered |= world.broadcast(None, found, rank)[1]
    return artifact.with_stage("codebook", Stage(gathered, settings))


def usual_codewords(tokens: int) -> int:
    """Codewords by default: 64, or as many as so many sampled tokens allow."""
    return max(1, min(CODEWORDS, tokens // TOKENS_PER_CODEWORD))


def _of_layer(
    artifact: Artifact, layer: Layer, report: bool, codewords: int, iterations: int, seed: int
) -> dict[str, Tensor]:
    settings: dict[str, Any] = {"iterations": iterations, "seed": seed}
    settings["where"] = f"layer {layer.index} of {artifact.name}"
    key, value = (artifact.tensor("reservoir", layer.index, name).float() for name in ("key_post", "value"))
    covariances = (artifact.tensor("moments", layer.index, f"{name}.covariance") for name in ("key_post", "value"))
    spread = spread_of(*covariances)
    found = fit_codebook(key, value, spread, codewords=codewords, **settings)
    basis = fit_code_basis(found, query_moments(artifact, layer), key, value)
    tensors = {
        "key": found.key,
        "value": found.value,
        "spread": found.spread,
        "sizes": found.sizes,
        "code.query_map": basis.query_map.float(),
        "code.key_map": basis.key_map.float(),
        "code.singular_values": basis.singular_values,
    }
    return tensors | (_carried(key, value, spread, codewords, settings) if report else {})


def _carried(
    key: Tensor, value: Tensor, spread: Tensor, codewords: int, settings: Mapping[str, Any]
) -> dict[str, Tensor]:
    """What codebooks of several sizes, fitted to the first half of a sample, do not explain of either half."""
    half = key.shape[1] // 2
    fitted, unseen = (key[:, :half], value[:, :half]), (key[:, half:], value[:, half:])
    sizes = sorted({size for size in (*SIZES, codewords) if size * TOKENS_PER_CODEWORD <= half} or {1})
    rows = []
    for size in sizes:
        book = fit_codebook(*fitted, spread, codewords=size, **settings)
        rows.append([*unexplained(book, *fitted), *unexplained(book, *unseen)])
    names = ("key_fitted", "value_fitted", "key_unseen", "value_unseen")
    columns = [torch.stack(column, -1) for column in zip(*rows, strict=True)]
    return {"carry.sizes": torch.tensor(sizes)} | {
        f"carry.{name}": column for name, column in zip(names, columns, strict=True)
    }


def query_moments(artifact: Artifact, layer: Layer) -> Moments:
    """Moments of a layer's queries after the rotary embedding."""
    count, mean, covariance = (
        artifact.tensor("moments", layer.index, f"query_post.{part}") for part in ("count", "mean", "covariance")
    )
    return Moments(int(count), mean, covariance)


def codebook_report(artifact: Artifact) -> dict[str, Any]:
    """How well codebooks carry over, by size: the share of the variance of keys and values that they do not explain,
    mean over KV heads, of the half of the sample that they were fitted to and of the other.

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
                    {"codewords": size, **{name: columns[name][entry] for name in names}}
                    for entry, size in enumerate(tried)
                ],
            }
        )
    return {"settings": dict(artifact.stages["codebook"].settings), "layers": layers}
