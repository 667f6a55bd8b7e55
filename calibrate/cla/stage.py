"""The stage `cla`: what sharing between neighbouring layers costs by the reservoir, and which layers share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

from ...artifacts import Artifact, Stage
from ...runtime.cla.method import stage_map
from ...runtime.cla.sharing_map import SharingMap
from ..pre_rotary import Rotation
from .cache_cost import BANDWIDTH, layers_bytes_per_token
from .group_cost import measure_groups
from .grouping import best_grouping
from .pairs import MEASURES, Pair, can_share, measure_pairs, rotates_back
from .pattern_costs import pattern_costs
from .patterns import PATTERNS
from .requested import check_sample, default_stored, refuse_to_lose, requested_map, shareable_layers

_REACH = 4
"""Layers of the largest group that is measured, unless such groups store more layers than are asked for."""


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
        pattern: one of PATTERNS, "auto" (the grouping into `stored_layers` groups of neighbours with the least sum
            of `measure_groups`; in groups of at most 4 layers, or of as many as it takes to store so few), or the
            groups themselves ("0-1,2-3").
        stored_layers: layers that store keys and values; by default what pattern and group give, for auto the number
            of full-attention layers over `group`, rounded up.
        rotation: the model's, from `rotation_of`; without it keys are aligned as rotated, and look less alike.
        overwrite: replace a stage `cla` that has trained weights.
        progress: called with (pairs and groups done, all of them).

    Returns:
        The artifact with the stage; `kvcal.artifacts.save` writes it.

    Raises:
        KvcalError: settings that this model cannot have, no reservoir, or trained weights in the way.
    """
    refuse_to_lose(artifact, overwrite)
    check_sample(artifact)
    chosen = requested_map(artifact, group=group, pattern=pattern, stored_layers=stored_layers)
    layers = shareable_layers(artifact)
    stored = stored_layers or (default_stored(artifact, group) if chosen is None else len(chosen.groups))
    reach = _REACH if chosen else max(_REACH, _reach_of_auto(artifact, layers, stored))
    groups = _groups(artifact, layers, reach) | set(chosen.shared if chosen else ())
    pairs = {(members[0], reader) for members in groups for reader in members[1:]}
    steps = progress or (lambda done, total: None)
    total = len(pairs) + len(groups)
    found = measure_pairs(artifact, pairs, rotation, lambda done, _: steps(done, total))
    cost = measure_groups(artifact, groups, rotation, lambda done, _: steps(len(pairs) + done, total))
    if chosen is None:
        indices = best_grouping(cost.T[layers][:, layers], stored)
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
        "group_costs": {
            str(SharingMap((members,))): float(cost[members[-1], members[0]]) for members in sorted(groups)
        },
    }
    return artifact.with_stage("cla", Stage(tensors, settings))


def share_report(artifact: Artifact) -> dict[str, Any]:
    """What the stage `cla` holds.

    Returns:
        {"settings", "groups": [[layer, …]], "predicted_loss": what its `group_costs` say of the groups, in all,
        "bytes_per_token": {"before", "after"} at 16 bit, of full-attention layers, "patterns": `pattern_costs`, each
        with its "predicted_loss", None where a group was not measured, "bandwidth": a sentence, "pairs": [{"storing",
        "reading", "shared", each of MEASURES, "cost_as_group": of all layers from the one to the other}], the nearest
        layers first}.
    """
    chosen, layers = stage_map(artifact), shareable_layers(artifact)
    settings = dict(artifact.stages["cla"].settings)
    costs = settings.get("group_costs", {})
    measured = {
        name: torch.stack([artifact.tensor("cla", layer.index, name) for layer in artifact.layers]) for name in MEASURES
    }
    pairs = [
        {
            "storing": storing,
            "reading": reading,
            "shared": reading in chosen.reading and chosen.storing_of(reading) == storing,
            **{name: float(measured[name][reading, storing]) for name in MEASURES},
            "cost_as_group": _cost_of(costs, [[layer for layer in layers if storing <= layer <= reading]]),
        }
        for storing, reading in _measured_pairs(measured["cost_as_is"])
    ]
    return {
        "settings": settings,
        "groups": [list(group) for group in chosen.groups],
        "predicted_loss": _cost_of(costs, chosen.shared),
        "bytes_per_token": {
            "before": layers_bytes_per_token(artifact.layers),
            "after": layers_bytes_per_token(artifact.layers, chosen),
        },
        "patterns": [
            {**pattern, "predicted_loss": _cost_of(costs, [group for group in pattern["groups"] if len(group) > 1])}
            for pattern in pattern_costs(artifact)
        ],
        "bandwidth": BANDWIDTH,
        "pairs": pairs,
    }


def _cost_of(costs: Mapping[str, float], groups: Sequence[Sequence[int]]) -> float | None:
    found = [costs.get(str(SharingMap((tuple(group),)))) for group in groups]
    return None if None in found else math.fsum(cost for cost in found if cost is not None)


def _reach_of_auto(artifact: Artifact, layers: Sequence[int], stored: int) -> int:
    """Layers of the largest group worth measuring: no grouping into `stored` groups has, or needs, a larger one."""
    kinds = artifact.layers
    starts = [
        index for index in range(1, len(layers)) if not can_share(*(kinds[layers[at]] for at in (index - 1, index)))
    ]
    runs = [end - start for start, end in pairwise((0, *starts, len(layers)))]
    longest = len(layers) - stored + 1
    enough = (reach for reach in range(_REACH, longest) if sum(-(-run // reach) for run in runs) <= stored)
    return next(enough, longest)


def _groups(artifact: Artifact, layers: Sequence[int], reach: int) -> set[tuple[int, ...]]:
    """Groups of two to `reach` neighbours that can share."""
    runs = (tuple(layers[first:end]) for first in range(len(layers)) for end in range(first + 2, first + reach + 1))
    return {
        run
        for run in runs
        if len(run) > 1 and all(can_share(artifact.layers[run[0]], artifact.layers[layer]) for layer in run)
    }


def _measured_pairs(cost: torch.Tensor) -> list[Pair]:
    """(storing, reading) where [reading, storing] is a number, the nearest layers first."""
    found = [(storing, reading) for reading, storing in (~cost.isnan()).nonzero().tolist()]
    return sorted(found, key=lambda pair: (pair[1] - pair[0], pair[0]))
