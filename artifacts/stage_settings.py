"""Checks of those settings of stages that readers depend on, as there are checks of tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .errors import ArtifactError

_GROUPS = re.compile(r"[0-9]{1,6}([-+,/][0-9]{1,6})*")
_TEXTS = ("run", "groups", "pool", "train")
_MOST_TRAININGS = 100


def check_settings(where: str, stage: str, settings: Mapping[str, Any], layers: int) -> None:
    """Refuse settings that docs/format.md does not allow: groups and training of the stage `cla`.

    Args:
        layers: how many the model has.

    Raises:
        ArtifactError: names the setting.
    """
    if stage != "cla":
        return
    groups = settings.get("groups")
    if not isinstance(groups, str) or not _GROUPS.fullmatch(groups):
        raise ArtifactError(f"{where}: groups {str(groups)[:40]!r} of stage cla: expected as 0-1,2-3: {_REMEDY}")
    if (last := max(map(int, re.findall("[0-9]+", groups)))) >= layers:
        raise ArtifactError(f"{where}: stage cla names layer {last}, the model has 0 to {layers - 1}: {_REMEDY}")
    training, trainings = settings.get("uptraining"), 0
    while training is not None:
        trainings += 1
        if not _describes_training(training) or trainings > _MOST_TRAININGS:
            raise ArtifactError(f"{where}: uptraining of stage cla is malformed: {_REMEDY}")
        training = training.get("earlier")


def _describes_training(found: Any) -> bool:
    if not isinstance(found, dict) or not all(isinstance(found.get(name), str) for name in _TEXTS):
        return False
    first, last = found.get("first_losses"), found.get("last_losses")
    if not (isinstance(first, dict) and isinstance(last, dict) and first.keys() == last.keys()):
        return False
    if not all(map(_is_number, (found.get("lr"), *first.values(), *last.values()))):
        return False
    steps = found.get("steps")
    return type(steps) is int and steps >= 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300


_REMEDY = "fetch it again, or make the stage again with `calibrate share ARTIFACT --model MODEL`"
