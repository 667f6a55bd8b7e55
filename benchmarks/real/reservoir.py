"""How many sampled tokens are enough: what is fitted to the reservoir, and what is measured on it, by its size.

One pass samples LARGEST tokens. A smaller sample is a uniform one of these (its first rows would be the beginning of
the text): draw 0 is what `calibrate pca --reservoir SIZE` keeps, the others have other seeds.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kvcal.artifacts import Artifact, Stage
from kvcal.calibrate.cla.pairs import measure_pairs
from kvcal.calibrate.cla.rotation import angles_of, rotation_of
from kvcal.calibrate.cla.xcla import groups_of, xcla
from kvcal.calibrate.clustering import assign, cluster_keys, to_metric_space
from kvcal.calibrate.codebook import Codebook, unexplained
from kvcal.calibrate.codebook_stage import codebook
from kvcal.calibrate.evaluation.standard_errors import mean
from kvcal.calibrate.planning.points import Problem
from kvcal.calibrate.reservoir import priorities
from kvcal.runtime.cla.group_code import KINDS, GroupCode

from ..shared.tables import with_error
from .attention import errors
from .group_errors import by_layer, errors_of
from .settings import LEVELS, spectral_of
from .shared_basis import Layer, rotations

LARGEST = 4096
SIZES = (512, 1024, 2048, LARGEST)
DRAWS = 3
"""Samples of each size but the largest."""
TEXTS = 8
"""Pieces of unseen text, prose and code."""
CLUSTERS = 128
GROUP, MEMORY = 3, 0.17
"""Of `xcla`, as in xcla.py."""


def draws(size: int) -> range:
    return range(1 if size == LARGEST else DRAWS)


def sampled(artifact: Artifact, size: int, draw: int = 0) -> Artifact:
    """With a sample of so many tokens of its reservoir."""
    reservoir = artifact.stages["reservoir"]
    token = reservoir.tensors["token"]
    chosen = priorities(token, artifact.settings["seed"] + 100 * draw).argsort(stable=True)[:size].sort().values
    tensors = {name: rows[chosen] if rows.dim() == 1 else rows[:, chosen] for name, rows in reservoir.tensors.items()}
    return artifact.with_stage("reservoir", Stage(tensors, reservoir.settings))


def by_sample(found: Sequence[Problem], artifact: Artifact, model: Any, size: int, draw: int) -> dict[str, Any]:
    """Everything below, of one sample; what takes minutes of the first draw only."""
    sample = sampled(artifact, size, draw)
    rows = codebooks(found, sample) | clusterings(found, sample)
    return rows if draw else rows | neighbours(sample, model) | codes(found, sample, model)


def codebooks(found: Sequence[Problem], sample: Artifact) -> dict[str, Any]:
    """Of a codebook of the usual size and its basis: attention errors of `spectral`, and "keys" and "values", the share
    of the variance of unseen ones that it does not explain. Numbers by text, means of layers."""
    fitted = codebook(sample, report=False)
    head_dim, length = found[0].key.shape[3], found[0].prefix
    rows: dict[str, Any] = {}
    for level in ("1/16", "1/8"):
        settings = spectral_of(head_dim // 2, 2, LEVELS[level], head_dim, length)
        (row,) = errors(found, settings, fitted)
        rows[f"spectral {level}"] = row["by_text"]
    left = [_left(problem, fitted) for problem in found]
    rows["keys"], rows["values"] = (torch.stack(part).mean(0).tolist() for part in zip(*left, strict=True))
    return rows


def _left(problem: Problem, artifact: Artifact) -> tuple[Tensor, Tensor]:
    """[B] of keys and of values."""
    names = ("key", "value", "spread", "sizes")
    book = Codebook(*(artifact.tensor("codebook", problem.layer, name) for name in names))
    by_text = [unexplained(book, *rows) for rows in zip(problem.key.float(), problem.value.float(), strict=True)]
    keys, values = (torch.stack([shares.mean() for shares in part]) for part in zip(*by_text, strict=True))
    return keys, values


def clusterings(found: Sequence[Problem], sample: Artifact) -> dict[str, Any]:
    """Of cosine clusters of the sampled keys: "directions", mean squared distance of the directions of unseen keys to
    the nearest centroid, by text, and "silhouette" of the sample, means of layers."""
    distances, silhouettes = [], []
    for problem in found:
        keys, values = (sample.tensor("reservoir", problem.layer, name).float() for name in ("key_post", "value"))
        fitted = cluster_keys(keys, values, clusters=CLUSTERS)
        silhouettes.append(float(fitted.silhouette.mean()))
        by_text = []
        for key in problem.key.float():
            heads = zip(key, fitted.centroids, strict=True)
            off = [to_metric_space(rows, "cosine") - words[assign(rows, words, "cosine")] for rows, words in heads]
            by_text.append(torch.stack(off).square().sum(-1).mean())
        distances.append(torch.stack(by_text))
    return {"directions": torch.stack(distances).mean(0).tolist(), "silhouette": statistics.fmean(silhouettes)}


@torch.no_grad()
def codes(found: Sequence[Problem], sample: Artifact, model: Any) -> dict[str, Any]:
    """Of codes of `xcla`: attention errors by text, mean of layers, with keys and values as they come back."""
    coded = xcla(sample, angles=angles_of(sample, model), group=GROUP, memory=MEMORY)
    _, at_row = rotations(sample, model, found[0].key.shape[2])
    layers = [Layer(problem, at_row) for problem in found]
    off = []
    for group in groups_of(sample, GROUP):
        indices = [layer.index for layer in group]
        rows = GroupCode.load(coded, indices[-1]).layers
        off += errors_of(layers, indices, {kind: by_layer([row[kind] for row in rows]) for kind in KINDS})
    return {"xcla": torch.stack(off).mean(0).tolist()}


def neighbours(sample: Artifact, model: Any) -> dict[str, Any]:
    """What `share` measures of layers that read the one before, means over them."""
    indices = [layer.index for layer in sample.full_layers]
    pairs = list(itertools.pairwise(indices))
    found = measure_pairs(sample, pairs, rotation_of(sample, model))
    names = ("key_r2", "value_r2", "cost_as_is", "cost_aligned")
    return {name: statistics.fmean(float(found[name][b, a]) for a, b in pairs) for name in names}


COLUMNS = {
    "spectral 1/16": "spectral, 1/16",
    "spectral 1/8": "spectral, 1/8",
    "xcla": "xcla",
    "keys": "keys",
    "values": "values",
    "directions": "directions",
    "silhouette": "silhouette",
    "key_r2": "R² of keys",
    "value_r2": "R² of values",
    "cost_aligned": "cost, aligned",
}
"""Of the page's table, by what is measured."""


def rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Of the page's table, a row for each size all of whose samples were measured."""
    made = []
    for size in SIZES:
        samples = [found.get(f"{size}, draw {draw}") for draw in draws(size)]
        largest = found.get(f"{LARGEST}, draw 0")
        if largest and all(samples):
            made.append(
                [
                    str(size),
                    *(_cell([sample[name] for sample in samples if name in sample], largest[name]) for name in COLUMNS),
                ]
            )
    return made


def _cell(samples: Sequence[Any], largest: Any) -> str:
    """Mean of samples; of numbers by text also what they are above those of the largest sample."""
    if isinstance(largest, float):
        return f"{statistics.fmean(samples):.3f}"
    by_text = [statistics.fmean(texts) for texts in zip(*samples, strict=True)]
    shown = with_error(*mean(by_text), ".4f")
    if by_text == largest:
        return shown
    more, error = mean([one - other for one, other in zip(by_text, largest, strict=True)])
    return f"{shown} ({more:+.4f} ± {error:.4f})"
