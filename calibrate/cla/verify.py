"""The stage `cla`; `load` has checked its measures."""

from __future__ import annotations

from ...artifacts import Artifact
from ...artifacts.claims import bounded, require_that
from ...runtime.cla.method import WEIGHTS, stage_map
from .patterns import PATTERNS

_KNOWN = {
    "pattern": (*PATTERNS, "auto", "list"),
    "pool": ("mean", "first", "fitted"),
    "keys_aligned": ("pre", "post"),
}


def check_sharing(artifact: Artifact, where: str) -> None:
    """Groups are of this model's layers, and trained weights are numbers."""
    stage = artifact.stages["cla"]
    groups = stage_map(artifact)
    groups.check([layer.index for layer in artifact.layers if layer.window is None], len(artifact.layers))
    stored = stage.settings.get("stored_layers")
    require_that(where, "stored_layers", stored == len(groups.groups), stored, f"{len(groups.groups)}, as in groups")
    for name, allowed in _KNOWN.items():
        found = stage.settings.get(name)
        require_that(where, name, found in allowed, found, " or ".join(allowed))
    trained = any(name.startswith(WEIGHTS) for name in stage.tensors)
    require_that(where, "pool", trained or stage.settings.get("pool") != "fitted", "fitted", "weights beside it")
    for name in stage.tensors:
        if name.startswith(WEIGHTS):
            found = stage.tensors[name]
            bounded(where, name, found, by_head=False)
            require_that(where, name, stage.settings.get("uptraining") is not None, "there", "no weights untrained")
