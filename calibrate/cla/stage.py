"""The stage `cla`: what sharing between neighbouring layers costs by the reservoir, and which layers share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch

from ...artifacts import Artifact, Stage
from ...runtime.cla.method import stage_map
from ...runtime.cla.sharing_map import SharingMap
from ..pre_rotary import Rotation
from .cache_cost import BANDWIDTH, layers_bytes_per_token
from .grouping import best_grouping
from .pairs import MEASURES, Pair, can_share, measure_pairs, rotates_back
from .pattern_costs import pattern_costs
from .patterns import PATTERNS
from .requested import default_stored, refuse_to_lose, requested_map, shareable_layers

_REACH = 4
"""Layers of the largest group whose pairs are measured in any case."""
_REACH_AUTO = 8
"""Layers of the largest group that `auto` makes, unless such groups store more layers than are asked for."""


def share(
    artifact: Artifact,
    *,
    group: int = 2,
    pattern: str = "uniform",
    stored_layers: int | None = None,
    rotation: Rotation | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Artifact:
    """Measure what sharing costs, choose which layers share, and add the stage `cla`.

    Args:
        group: layers of a full group.
        pattern: one of PATTERNS, "auto" (the grouping into `stored_layers` groups of neighbours with the least
            sum, over the reading layers, of cost_aligned², the relative squared errors of their outputs; in groups
            of at most 8 layers, or of as many as it takes to store so few), or the groups themselves ("0-1,2-3").
        stored_layers: layers that store keys and values; by default what pattern and group give, for auto the number
            of full-attention layers over `group`, rounded up.
        rotation: the model's, from `rotation_of`; without it keys are aligned as rotated, and look less alike.
        overwrite: replace a stage `cla` that has trained weights.
        progress: called with (pairs done, pairs in all).

    Returns:
        The artifact with the stage; `kvcal.artifacts.save` writes it.

    Raises:
        KvcalError: settings that this model cannot have, no reservoir, or trained weights in the way.
    """
    refuse_to_lose(artifact, overwrite)
    chosen = requested_map(artifact, group=group, pattern=pattern, stored_layers=stored_layers)
    layers = shareable_layers(artifact)
    stored = stored_layers or (default_stored(artifact, group) if chosen is None else len(chosen.groups))
    pairs = _pairs(artifact, layers, _REACH if chosen else max(_REACH, _reach_of_auto(artifact, layers, stored)))
    pairs |= {(shared[0], reader) for shared in (chosen.shared if chosen else ()) for reader in shared[1:]}
    found = measure_pairs(artifact, pairs, rotation, progress)
    if chosen is None:
        cost = found["cost_aligned"].T[layers][:, layers].square()
        indices = best_grouping(cost, stored)
        chosen = SharingMap(tuple(tuple(layers[index] for index in part) for part in indices))
    tensors = {
        f"layers.{layer.index}.{name}": found[name][layer.index].clone()
        for layer in artifact.layers
        for name in MEASURES
    }
    before_rotary = all(rotates_back(artifact.layers[layer], rotation) for layer in layers)
    settings = {
        "groups": str(chosen),
        "pattern": pattern if pattern in (*PATTERNS, "auto") else "list",
        "pool": "mean",
        "stored_layers": sum(layer in chosen.storing for layer in layers),
        "keys_aligned": "pre" if before_rotary else "post",
        "uptraining": None,
    }
    return artifact.with_stage("cla", Stage(tensors, settings))


def share_report(artifact: Artifact) -> dict[str, Any]:
    """What the stage `cla` holds.

    Returns:
        {"settings", "groups": [[layer, …]], "predicted_loss": sum of cost_aligned² over the reading layers,
        "bytes_per_token": {"before", "after"} at 16 bit, of the full-attention layers, "patterns": `pattern_costs`,
        "bandwidth": a sentence, "pairs": [{"storing", "reading", "shared", and each of MEASURES}], the nearest
        layers first}.
    """
    chosen = stage_map(artifact)
    settings = dict(artifact.stages["cla"].settings)
    measured = {
        name: torch.stack([artifact.tensor("cla", layer.index, name) for layer in artifact.layers]) for name in MEASURES
    }
    pairs = [
        {
            "storing": storing,
            "reading": reading,
            "shared": reading in chosen.reading and chosen.storing_of(reading) == storing,
            **{name: float(measured[name][reading, storing]) for name in MEASURES},
        }
        for storing, reading in _measured_pairs(measured["cost_as_is"])
    ]
    loss = sum(pair["cost_aligned"] ** 2 for pair in pairs if pair["shared"])
    return {
        "settings": settings,
        "groups": [list(group) for group in chosen.groups],
        "predicted_loss": loss,
        "bytes_per_token": {
            "before": layers_bytes_per_token(artifact.layers),
            "after": layers_bytes_per_token(artifact.layers, chosen),
        },
        "patterns": pattern_costs(artifact),
        "bandwidth": BANDWIDTH,
        "pairs": pairs,
    }


def _reach_of_auto(artifact: Artifact, layers: Sequence[int], stored: int) -> int:
    """Layers of the largest group worth measuring: no grouping into `stored` groups has, or needs, a larger one."""
    kinds = artifact.layers
    starts = [
        index for index in range(1, len(layers)) if not can_share(*(kinds[layers[at]] for at in (index - 1, index)))
    ]
    runs = [end - start for start, end in pairwise((0, *starts, len(layers)))]
    longest = len(layers) - stored + 1
    enough = (reach for reach in range(_REACH_AUTO, longest) if sum(-(-run // reach) for run in runs) <= stored)
    return next(enough, longest)


def _pairs(artifact: Artifact, layers: Sequence[int], reach: int) -> set[Pair]:
    """Pairs that groups of at most `reach` neighbours can have."""
    return {
        (storing, reading)
        for index, storing in enumerate(layers)
        for reading in layers[index + 1 : index + reach]
        if can_share(artifact.layers[storing], artifact.layers[reading])
    }


def _measured_pairs(cost: torch.Tensor) -> list[Pair]:
    """(storing, reading) where [reading, storing] is a number, the nearest layers first."""
    found = [(storing, reading) for reading, storing in (~cost.isnan()).nonzero().tolist()]
    return sorted(found, key=lambda pair: (pair[1] - pair[0], pair[0]))
