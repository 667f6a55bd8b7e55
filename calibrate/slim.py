"""The slim form of an artifact on disk: what decoding needs, with its plan and a card that says what is left out."""

from __future__ import annotations

import os
from pathlib import Path

from .. import artifacts
from ..artifacts import Artifact, KvcalError
from ..artifacts.places import check_new_folder
from ..artifacts.plain_files import read_plain
from ..artifacts.writing import has_content
from ..runtime.planned import FILE as PLAN
from ..runtime.planned import has_plan, read_plan
from .card import card_files


def save_slim(artifact: Artifact, folder: str | os.PathLike[str]) -> Artifact:
    """Write `artifacts.slim` of an artifact to a new folder; of one that is slim already, the same again.

    Raises:
        KvcalError: something is at `folder`, the disk does not take it, a plan that is none, or as `artifacts.slim`.
    """
    folder = Path(folder)
    check_new_folder(folder)
    if has_content(folder):
        raise KvcalError(f"{folder}: already exists: choose another name or remove it")
    made = artifacts.slim(artifact)
    extras = card_files(made)
    if has_plan(artifact):
        read_plan(artifact)  # raises where it is none
        extras[PLAN] = read_plain(artifact.folder / PLAN)  # type: ignore[operator]
    return artifacts.save(made, folder, extras)
