"""Open an artifact by folder or Hub id, and make sure that it belongs to the model at hand."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .. import artifacts
from ..artifacts import Artifact, ArtifactError, MismatchError, differences, fingerprint, weights_sha256
from . import hub


def load(source: str | os.PathLike[str], revision: str | None = None) -> Artifact:
    """Load an artifact and verify it.

    Args:
        source: a folder, or a Hub id `org/name` (needs huggingface_hub; its cache is used first).
        revision: branch, tag or commit of the Hub id.

    Raises:
        KvcalError: not found here, in the Hub's cache or online; as ArtifactError: damaged, or of a newer schema.
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
    # The kind of model first, single numbers before lists of one entry per layer.
    different = differences(artifact.model.fingerprint, found)
    different.sort(key=lambda entry: (entry[0] != "model_type", isinstance(entry[1], (list, dict))))
    for name, ours, theirs in different:
        raise MismatchError(
            f"{artifact.name} was fitted for {name} {ours} ({artifact.model.id}), this model has {theirs}: "
            "calibrate this model with `calibrate pca --model …`"
        )
    if weights and weights_sha256(model) != artifact.model.weights_sha256:
        raise MismatchError(
            f"{artifact.name} was fitted on other weights ({artifact.model.id}, same architecture): "
            "load the checkpoint it names, or calibrate this model with `calibrate pca --model …`"
        )


def _download(name: str, revision: str | None) -> Path:
    try:
        found = hub.locate(name, "model", revision, _lacking)
        if found.folder is not None:
            return found.folder
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, revision=found.revision))
    except ImportError:
        raise ArtifactError(f"{name}: no such folder, and Hub ids need huggingface_hub: pip install it") from None


def _lacking(folder: Path) -> str | None:
    """A cache may hold some files of a repository only; the manifest names all that are needed."""
    try:
        artifacts.load(folder)
    except ArtifactError as error:
        return f"a whole artifact ({error})"
    return None
