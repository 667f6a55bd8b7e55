"""Open an artifact by folder or Hub id, and make sure that it belongs to the model at hand."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .. import artifacts
from ..artifacts import Artifact, ArtifactError, MismatchError, differences, fingerprint, weights_sha256


def load(source: str | os.PathLike[str], revision: str | None = None) -> Artifact:
    """Load an artifact and verify it.

    Args:
        source: a folder, or a Hub id `org/name` (needs huggingface_hub; its cache is used first).
        revision: branch, tag or commit of the Hub id.

    Raises:
        ArtifactError: not found, damaged, or of a newer schema.
    """
    if Path(source).exists():
        return artifacts.load(source)
    name = os.fspath(source)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ArtifactError(f"{name}: no such artifact folder: make one with `calibrate pca --output {name}`")
    return artifacts.load(_download(name, revision))


def check_model(artifact: Artifact, model: Any, *, weights: bool = False) -> None:
    """Refuse a model that `artifact` was not calibrated on.

    Args:
        model: anything with a transformers `config`; with `weights=True` a torch module.
        weights: also compare the hash over all weights (reads every one: seconds per GB).

    Raises:
        MismatchError: names what differs on both sides, and what to do.
    """
    found = fingerprint(model.config)
    for name, ours, theirs in differences(artifact.model.fingerprint, found):
        raise MismatchError(
            f"{artifact.name} was fitted for {name} {ours} ({artifact.model.id}), this model has {theirs}: "
            "calibrate this model with `calibrate pca --model …`"
        )
    if weights and weights_sha256(model) != artifact.model.weights_sha256:
        raise MismatchError(
            f"{artifact.name} was fitted on other weights ({artifact.model.id}, same architecture): "
            "load the checkpoint it names, or calibrate this model with `calibrate pca --model …`"
        )


def _download(name: str, revision: str | None) -> str:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ArtifactError(f"{name}: no such folder, and Hub ids need huggingface_hub (pip install it)") from None
    try:
        return snapshot_download(name, revision=revision, local_files_only=True)
    except OSError:
        pass
    try:
        return snapshot_download(name, revision=revision, etag_timeout=3)
    except Exception as error:  # whatever the Hub client raises, the user needs the same line
        raise ArtifactError(
            f"{name}: no such folder, not in the Hub cache, and not to be had from the Hub "
            f"({type(error).__name__}): download it where there is a network and pass the folder"
        ) from error
