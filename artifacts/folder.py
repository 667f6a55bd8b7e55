"""Artifacts on disk: an interrupted write leaves the old or the new one whole, and no file that is read is trusted.

Stage files carry the start of their hash in their name, so replacing a stage never touches a file that the current
manifest names; renaming the new manifest into place is the commit.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .artifact import Artifact, Stage
from .errors import ArtifactError, KvcalError
from .locks import locked
from .manifest import FILE_NAME, MANIFEST, manifest_bytes, parse_manifest, read_manifest
from .schema import LAYER_TENSORS, check_stage
from .signals import signals_held
from .stage_settings import check_settings
from .syncing import in_one_line, reason
from .tensor_file import StageFile, TensorFile
from .values import check_values
from .workplace import Workplace
from .writing import has_content, new_folder

MADE_OF_IT = ("plan.json", "plan.measured.json", "clusters.png", "quality.png", "uptraining.png")
"""Files that commands put into an artifact's folder, and that mean nothing beside another artifact."""
_MOST_READINGS = 100
"""Attempts to read an artifact that is replaced by another process meanwhile."""


def load(folder: str | os.PathLike[str]) -> Artifact:
    """Open an artifact after checking manifest, schema, shapes and hashes of every stage.

    What is returned stays as it was verified: a writer that replaces the artifact meanwhile changes nothing of it.

    Raises:
        ArtifactError: anything that does not hold, in one line.
    """
    folder = Path(folder)
    for _ in range(_MOST_READINGS):
        manifest = read_manifest(folder)
        artifact = manifest[0]
        try:
            return _with_stages(folder, *manifest)
        except ArtifactError:
            # A writer removes files of the old state once the new one is there.
            if read_manifest(folder)[0].content_hash == artifact.content_hash:
                raise
    raise ArtifactError(f"{folder}: is being changed all the time by another process: load it again later")


def save(
    artifact: Artifact,
    folder: str | os.PathLike[str],
    extras: Mapping[str, bytes] | None = None,
    *,
    replace: bool = False,
) -> Artifact:
    """Write an artifact: a new folder appears whole or not at all; an existing one is updated in one step.

    Args:
        extras: files beside the tensors (the card, figures), by plain name; they are not part of the hash.
        replace: take the place of another artifact that is at `folder`, whose plan and figures go, too.

    Raises:
        ArtifactError: `folder` exists and this artifact was not loaded from it; or, with `replace`, no artifact is
            there.
        KvcalError: the disk is full or not writable, or the artifact is one that `load` would refuse.
    """
    folder = Path(folder)
    with in_one_line(folder):
        exists = has_content(folder)
        replaces = exists and not _was_loaded_from(artifact, folder)
        if replaces and not replace:
            raise ArtifactError(f"{folder}: already exists: choose another name or remove it")
        if replaces:
            check_replaceable(folder)
    if not exists:
        return _create(artifact, folder, extras or {})
    return _update(artifact, folder, extras or {}, replaces)


def check_replaceable(folder: Path) -> None:
    """Check that `folder` is an artifact itself, and no link to one. Raises ArtifactError."""
    if folder.is_symlink():
        raise ArtifactError(f"{folder}: is a link, and is not replaced: give the folder that it leads to")
    read_manifest(folder)


def _with_stages(
    folder: Path, artifact: Artifact, files: Mapping[str, StageFile], settings: Mapping[str, Mapping[str, Any]]
) -> Artifact:
    stages = {}
    for name, file in files.items():
        tensors = TensorFile(folder, file)
        check_stage(str(tensors.path), name, tensors.header, artifact.layers)
        check_settings(str(folder / MANIFEST), name, settings[name], len(artifact.layers))
        check_values(str(tensors.path), name, tensors, settings[name], artifact)
        stages[name] = Stage(tensors, settings[name])
    return dataclasses.replace(artifact, stages=stages)


def _was_loaded_from(artifact: Artifact, folder: Path) -> bool:
    tensors = [stage.tensors for stage in artifact.stages.values()]
    if any(isinstance(mapping, TensorFile) and mapping.lies_in(folder) for mapping in tensors):
        return True  # the very files, even if the folder had another path when they were loaded
    try:
        return artifact.folder is not None and folder.samefile(artifact.folder)
    except OSError:
        return False


def _create(artifact: Artifact, folder: Path, extras: Mapping[str, bytes]) -> Artifact:
    with new_folder(folder) as building, Workplace(building) as work:
        files = {name: work.place_tensors(name, stage.tensors) for name, stage in artifact.stages.items()}
        content = manifest_bytes(artifact, files)[0]
        saved = _with_stages(building, *parse_manifest(building, content))
        for name, extra in {**extras, MANIFEST: content}.items():
            work.place(work.write(extra), name)
    for stage in saved.stages.values():
        stage.tensors.moved_to(folder)  # type: ignore[attr-defined]
    return dataclasses.replace(saved, folder=folder)


def _update(artifact: Artifact, folder: Path, extras: Mapping[str, bytes], replaces: bool) -> Artifact:
    """
    Args:
        replaces: what is there is another artifact, and not an earlier state of this one.
    """
    with in_one_line(folder), locked(folder), Workplace(folder) as work:
        current = read_manifest(folder)[0]
        if not replaces and current.content_hash != artifact.content_hash:
            raise ArtifactError(f"{folder}: was changed meanwhile by another process: repeat the command")
        if artifact.slim_of is not None and current.slim_of is None and not replaces:
            raise ArtifactError(
                f"{folder}: holds the full artifact, which its slim form would take with it: save it elsewhere"
            )
        files: dict[str, StageFile] = {}
        placed: list[str] = []
        try:
            for name, stage in artifact.stages.items():
                if isinstance(stage.tensors, TensorFile) and stage.tensors.lies_in(folder):
                    files[name] = stage.tensors.file
                else:
                    files[name] = work.place_tensors(name, stage.tensors)
                    placed.append(files[name].file)
            content = manifest_bytes(artifact, files)[0]
            # What `load` would refuse must not replace what it takes.
            saved = _with_stages(folder, *parse_manifest(folder, content))
            manifest = work.write(content)
            beside = {name: work.write(extra) for name, extra in extras.items()}
            work.sync()
            with signals_held():
                work.place(manifest, MANIFEST)
        except BaseException:
            _roll_back(folder, work, placed)
            raise
        work.confirm()
        gone = MADE_OF_IT if replaces else ()
        _after_commit(folder, work, beside, {file.file for file in files.values()}, gone)
        return saved


def _roll_back(folder: Path, work: Workplace, placed: list[str]) -> None:
    """Remove what was placed, but nothing that the manifest on the disk names: that may be the new one already."""
    try:
        named = {file.file for file in read_manifest(folder)[1].values()}
    except ArtifactError:
        return  # what it names is not known
    for name in placed:
        if name not in named:
            work.remove(name)


def _after_commit(
    folder: Path, work: Workplace, beside: Mapping[str, str], named: set[str], gone: Iterable[str]
) -> None:
    """The artifact is saved: put the files beside its tensors in place, then remove stage files of its former state.

    Args:
        gone: files of the artifact that was replaced.
    """
    try:
        for name in gone:
            if os.path.lexists(folder / name):
                work.remove(name)
        for name, temporary in beside.items():
            work.place(temporary, name)
        for path in list(folder.iterdir()):
            if FILE_NAME.fullmatch(path.name) and path.name.split(".")[0] in LAYER_TENSORS and path.name not in named:
                work.remove(path.name)
        work.sync()
    except OSError as error:
        raise KvcalError(
            f"{folder}: the artifact was saved, but not all that lies beside its tensors ({reason(error)}): "
            "check the disk; `calibrate verify` tells whether the artifact holds"
        ) from error
