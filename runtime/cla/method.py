"""The method `cla`: layers share keys and values as the artifact's stage `cla` says, and another method decodes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ...artifacts import Artifact, KvcalError, Stage
from ...artifacts.claims import bounded
from ..methods.amounts import check_choice, check_flag
from ..methods.base import Method
from ..methods.basis import UPTRAIN
from .sharing_map import SharingMap

NAME = "cla"
STAGE = "cla"
WEIGHTS = "weights."
"""What names of trained parameters begin with in the stage."""
SHARE = "make it with `calibrate share ARTIFACT --model MODEL`"


@dataclass(frozen=True)
class Cla:
    """Parameters of `cla`, beside those of the method that decodes: `method="cla+loki"` has both."""

    groups: str | SharingMap | None = None
    """Layers that share, e.g. "0-1,2-3"; None: as the artifact's stage `cla` says."""
    pool: str = "mean"
    """Projections that were not trained together: their "mean", or those of the "first" layer of a group."""
    uptrained: bool | None = None
    """Whether the weights are the trained ones of the stage; None: where it has some for these groups."""


@dataclass(frozen=True)
class Resolved:
    """`cla` with the groups, weights and bases that an artifact has for it."""

    map: SharingMap
    pool: str
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    bases: Mapping[str, Tensor] = field(default_factory=dict)
    """Of the shared keys, named as in the stage `pca`."""


def split_method(method: Any, settings: Mapping[str, Any]) -> tuple[Cla | None, Any, dict[str, Any]]:
    """(`cla` or None, the method that decodes, its settings): "cla" decodes with `full`, "cla+loki" with `loki`."""
    settings = dict(settings)
    if not isinstance(method, str) or method.partition("+")[0] != NAME:
        return None, method, settings
    own = {name.name: settings.pop(name.name) for name in dataclasses.fields(Cla) if name.name in settings}
    return Cla(**own), "full" if method == NAME else method.partition("+")[2], settings


def resolve(cla: Cla, artifact: Artifact | None) -> Resolved:
    """Raises KvcalError: no groups given and none in the artifact, or weights that do not go with `pool`."""
    check_choice("pool", cla.pool, ("mean", "first"))
    if cla.uptrained is not None:
        check_flag("uptrained", cla.uptrained)
    stage = artifact.stages.get(STAGE) if artifact is not None else None
    groups = cla.groups if isinstance(cla.groups, SharingMap) or cla.groups is None else SharingMap.parse(cla.groups)
    if groups is None and stage is None:
        where = "no artifact" if artifact is None else f"{artifact.name} has no stage cla"
        raise KvcalError(
            f"cla: which layers share? {where}: give groups, e.g. groups='0-1,2-3', or make the stage with "
            "`calibrate share ARTIFACT --model M`"
        )
    found = stage_map(artifact) if artifact is not None and stage is not None else None
    if stage is None or found is None or (groups is not None and groups != found):
        assert groups is not None
        _check_trained(cla, groups, {})
        return Resolved(groups, cla.pool)
    weights = {name.removeprefix(WEIGHTS): stage.tensors[name] for name in stage.tensors if name.startswith(WEIGHTS)}
    for name, weight in weights.items():
        bounded(f"{artifact.name}, stage {STAGE}" if artifact else STAGE, WEIGHTS + name, weight, by_head=False)
    started = stage.settings.get("pool", "mean")
    _check_trained(cla, found, weights)
    if not weights or cla.uptrained is False:
        return Resolved(found, cla.pool)
    if cla.pool not in ("mean", started):
        raise KvcalError(
            f"pool {cla.pool!r}: the stage's trained weights began from pool {started!r}: give uptrained=False for "
            "projections that were not trained"
        )
    bases = {name: stage.tensors[name] for name in stage.tensors if re.match(r"layers\.\d+\.key_(pre|post)\.", name)}
    # Fitted weights are all in the stage: what they replace may be pooled in any way.
    return Resolved(found, "mean" if started == "fitted" else started, weights, bases)


def _check_trained(cla: Cla, groups: SharingMap, weights: Mapping[str, Tensor]) -> None:
    if cla.uptrained and not weights:
        raise KvcalError(
            f"uptrained=True: the artifact has no trained weights for groups {groups}: make them with {UPTRAIN}"
        )


def stage_map(artifact: Artifact) -> SharingMap:
    """The groups of the stage `cla`. Raises KvcalError: no such stage, or one that does not say."""
    if STAGE not in artifact.stages:
        raise KvcalError(f"{artifact.name}: no stage cla: {SHARE}")
    try:
        return SharingMap.parse(artifact.stages[STAGE].settings.get("groups"))  # type: ignore[arg-type]
    except KvcalError as error:
        raise KvcalError(f"{artifact.name}: its stage cla is damaged ({error}): {SHARE}") from error


def check_methods(groups: SharingMap, methods: Mapping[int, Method], bases: Mapping[str, Tensor] | None) -> None:
    """Refuse methods whose stores depend on one layer's queries, or that lack a basis of the shared keys.

    Args:
        methods: by layer with full attention.
        bases: of the shared keys; None: the artifact's own are.

    Raises:
        KvcalError: names the layers and the reason.
    """
    for group in groups.shared:
        method = methods[group[0]]
        if other := [layer for layer in group if methods[layer] != method]:
            raise KvcalError(
                f"layers {group[0]} and {other[0]} share one cache: give them the same method and settings (with "
                "dense_layers, whole groups)"
            )
        if why := method.not_shared():
            raise KvcalError(f"layers {', '.join(map(str, group))} share keys and values, and {why}")
    for layer, method in methods.items():
        reads = groups.storing_of(layer) != layer
        if reads or bases is None:
            continue
        method.check_changed_keys(layer, bases)


def with_bases(artifact: Artifact, bases: Mapping[str, Tensor]) -> Artifact:
    """The artifact for layers that share keys: with these bases, without what was fitted to other keys."""
    fitted = ("moments", "pca", "score", "clusters", "codebook", "reservoir", "xcla")
    stages = {name: stage for name, stage in artifact.stages.items() if name not in fitted}
    return dataclasses.replace(artifact, stages={**stages, "pca": Stage(bases)})
