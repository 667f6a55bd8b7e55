"""What uptraining leaves in an artifact: trained weights and refit bases in the stage `cla`, beside the map."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...artifacts import Artifact, KvcalError, Stage
from ...runtime.cla.method import STAGE, WEIGHTS, Cla, resolve, stage_map
from .refit import KEY_QUANTITIES
from .uptraining import Uptrained


def with_uptraining(artifact: Artifact, uptrained: Uptrained, bases: Mapping[str, Tensor]) -> Artifact:
    """The artifact with the result of an uptraining in its stage `cla`, in the place of an earlier one's.

    Args:
        bases: of `refit_keys`.

    Raises:
        KvcalError: the stage is missing, or of other groups.
    """
    groups = str(stage_map(artifact))
    if groups != uptrained.settings["groups"]:
        raise KvcalError(
            f"{artifact.name}: its stage cla shares {groups}, the training {uptrained.settings['groups']}: "
            "give both the same groups"
        )
    stage = artifact.stages[STAGE]
    measured = {name: tensor for name, tensor in stage.tensors.items() if not _is_trained(name)}
    weights = {WEIGHTS + name: tensor for name, tensor in uptrained.weights.items()}
    settings = {**stage.settings, "pool": uptrained.settings["pool"], "uptraining": dict(uptrained.settings)}
    return artifact.with_stage(STAGE, Stage({**measured, **weights, **bases}, settings))


def earlier_training(artifact: Artifact) -> Uptrained:
    """What the stage `cla` has of an uptraining, to go on from. Raises KvcalError: there was none."""
    found = resolve(Cla(), artifact)
    settings = artifact.stages[STAGE].settings.get("uptraining")
    if not (found.weights and settings):
        raise KvcalError(f"{artifact.name}: nothing was trained yet: leave --continue out")
    return Uptrained(found.weights, (), settings)


def finished_run(artifact: Artifact) -> str | None:
    """The `run` of the uptraining whose result the artifact holds."""
    stage = artifact.stages.get(STAGE)
    uptraining: Any = stage.settings.get("uptraining") if stage else None
    return uptraining["run"] if uptraining else None


def steps_in_all(uptraining: Mapping[str, Any]) -> int:
    """Of a training and those that it went on from."""
    earlier = uptraining.get("earlier")
    return int(uptraining["steps"]) + (steps_in_all(earlier) if earlier else 0)


def _is_trained(name: str) -> bool:
    return name.startswith(WEIGHTS) or (name.startswith("layers.") and name.split(".")[2] in KEY_QUANTITIES)
