"""The plan of an artifact: a method and its settings for every layer, made by `calibrate plan`.

    {"format": 1, "layers": [{"method": "spectral", "rank": 32, …}, …, null], …}

`layers` has an entry for every layer of the model, null where the layer keeps the model's own cache; all else in the
file tells how the plan was found and what it was measured to do.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..artifacts import Artifact, ArtifactError, KvcalError
from ..artifacts.plain_files import read_plain
from .settings import DEFAULT_METHOD

FILE = "plan.json"
FORMAT = 1
NAME = "plan"
"""What stands for the plan where a method is named."""
_MOST_BYTES = 4 << 20
_OF_CLUSTERS = {"stage", "basis", "tail", "tokens_per_cluster", "window", "clip", "refine", "flat_below"}
"""Parameters of `spectral` when it read clusters instead of codebooks."""
_MAKE = "make it with `calibrate plan ARTIFACT --model MODEL --data DATA`"


def chosen(artifact: Artifact | None, method: Any, settings: Mapping[str, Any], total: int) -> Any:
    """What a `method` argument means: the plan where none is named and the artifact has one, else `loki`.

    Raises:
        KvcalError: settings beside a plan, which has its own; a plan that is not there.
    """
    planned = method == NAME or (method is None and has_plan(artifact))
    if planned and settings:
        names = ", ".join(settings)
        raise KvcalError(f"{names}: the plan of this artifact has settings of its own: name a method to give others")
    return methods_of(artifact, total) if planned else DEFAULT_METHOD if method is None else method


@contextmanager
def naming(artifact: Artifact | None) -> Iterator[None]:
    """Errors inside are about the plan of this artifact, where one is given: nobody typed what they complain of."""
    try:
        yield
    except KvcalError as error:
        if artifact is None:
            raise
        raise type(error)(f"{artifact.name}: {FILE}: {error}: {_MAKE}") from None


def has_plan(artifact: Artifact | None) -> bool:
    return artifact is not None and artifact.folder is not None and os.path.lexists(artifact.folder / FILE)


def read_plan(artifact: Artifact | None) -> dict[str, Any]:
    """The whole file, its `layers` checked as far as types go; names and values are checked where stores are built.

    Raises:
        ArtifactError: no plan there, or none that can be read.
    """
    if artifact is None or not has_plan(artifact):
        where = "no artifact was given" if artifact is None else f"{artifact.name}: has no {FILE}"
        raise ArtifactError(f"{where}: {_MAKE}")
    assert artifact.folder is not None
    path = artifact.folder / FILE
    try:
        body = json.loads(read_plain(path, _MOST_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: cannot be read ({error}): {_MAKE}") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise ArtifactError(f"{path}: is no plan of format {FORMAT}: {_MAKE}")
    layers = body.get("layers")
    if not isinstance(layers, list) or not all(entry is None or _is_setting(entry) for entry in layers):
        raise ArtifactError(f"{path}: layers: expected a list of settings or null: {_MAKE}")
    return body


def is_plan(path: Path) -> bool:
    """Whether a file holds a plan, of whatever format."""
    try:
        body = json.loads(read_plain(path, _MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(body, dict) and type(body.get("format")) is int and isinstance(body.get("layers"), list)


def methods_of(artifact: Artifact | None, total: int) -> list[Mapping[str, Any]]:
    """The plan as an argument `method`: one entry for each of the model's `total` layers.

    Raises:
        ArtifactError: no plan, one for another number of layers, or one of `spectral` as it was with clusters.
    """
    layers = read_plan(artifact)["layers"]
    assert artifact is not None
    _refuse_clusters(layers, artifact)
    if len(layers) != total:
        raise ArtifactError(
            f"{artifact.name}: {FILE} has {len(layers)} layers, this model has {total}: {_MAKE}, or name a method"
        )
    return [{"method": "full"} if entry is None else entry for entry in layers]


def _refuse_clusters(layers: Sequence[Mapping[str, Any] | None], artifact: Artifact) -> None:
    for layer, entry in enumerate(layers):
        old = _OF_CLUSTERS & entry.keys() if entry and entry["method"] == "spectral" else ()
        if old:
            first = "" if "codebook" in artifact.stages else "`calibrate cluster ARTIFACT --metric joint`, then "
            raise ArtifactError(
                f"{artifact.name}: {FILE}, layer {layer}: {', '.join(sorted(old))}: made for spectral with clusters, "
                f"which reads codebooks now: plan anew with {first}`calibrate plan ARTIFACT --model MODEL --data DATA`"
            )


def _is_setting(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("method"), str)
        and all(value is None or isinstance(value, (bool, int, float, str)) for value in entry.values())
    )
