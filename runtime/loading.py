"""Open an artifact by folder or Hub id, and make sure that it belongs to the model at hand."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .. import artifacts
from ..artifacts import (
    Artifact,
    ArtifactError,
    KvcalError,
    MismatchError,
    differences,
    fingerprint,
    weights_sha256,
)
from ..artifacts.manifest import MANIFEST, read_manifest
from ..artifacts.missing import does_not_exist
from ..artifacts.packages import missing
from . import hub
from .planned import FILE as PLAN
from .wrapped import unwrapped

CARD = "README.md"


def load(source: str | os.PathLike[str], revision: str | None = None) -> Artifact:
    """Load an artifact and verify it.

    Args:
        source: a folder, or a Hub id `org/name` or `org/name@revision` (needs huggingface_hub; its cache is used
            first).
        revision: branch, tag or commit of the Hub id; None: the default branch, of which an older state may lie in
            the cache: name a branch to ask the Hub, or a commit to get the same for ever.

    Raises:
        KvcalError: not found here, in the Hub's cache or online; as ArtifactError: damaged, or of a newer schema.
    """
    if _is_there(source):
        return artifacts.load(source)
    name, _, stated = os.fspath(source).partition("@")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ArtifactError(does_not_exist(source, f"make an artifact with `calibrate pca --output {source}`"))
    if stated and revision not in (None, stated):
        raise ArtifactError(f"{source}: and revision {revision!r} beside it: give one of them")
    return artifacts.load(_download(name, stated or revision))


def check_model(artifact: Artifact, model: Any, *, weights: bool = False) -> None:
    """Refuse a model that `artifact` was not calibrated on.

    Args:
        model: anything with a transformers `config`; with `weights=True` a torch module.
        weights: also compare the hash over all weights (reads every one: seconds per GB).

    Raises:
        MismatchError: names what differs on both sides, and what to do.
    """
    model = unwrapped(model)
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


def _is_there(source: str | os.PathLike[str]) -> bool:
    try:
        return Path(source).exists()
    except (OSError, ValueError):  # too long for a path, or with a zero byte
        return False


def _download(name: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import constants, hf_hub_download, snapshot_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError:
        raise missing("huggingface_hub", f"find {name}, which is no folder here, on the Hub") from None
    found = hub.locate(name, "model", revision, _lacking)
    if found.folder is not None:
        return found.folder
    try:
        # The manifest first: a repository may be anything, and hold hundreds of GB.
        manifest = hf_hub_download(name, MANIFEST, revision=found.revision, endpoint=constants.ENDPOINT)
        files = read_manifest(Path(manifest).parent)[1]
        wanted = [MANIFEST, CARD, PLAN, *(file.file for file in files.values())]
        return Path(
            snapshot_download(name, revision=found.revision, endpoint=constants.ENDPOINT, allow_patterns=wanted)
        )
    except KvcalError:
        raise
    except Exception as error:  # the network's, the server's or the disk's fault
        # The client tells by a subclass that it could not ask.
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            problem = f"that repository is not a kvcal artifact (no {MANIFEST}): check the id"
            raise ArtifactError(f"{name}: {problem}") from None
        raise KvcalError(f"{name}: the download failed ({hub.one_line(error)}): try again") from error


def _lacking(folder: Path) -> str | None:
    """A cache may hold some files of a repository only; the manifest names all that are needed."""
    try:
        artifacts.load(folder)
    except ArtifactError as error:
        return f"a whole artifact ({error})"
    return None
