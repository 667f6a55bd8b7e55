"""The slim form of an artifact: what decoding needs, a few MB, with the hashes of all that the full artifact has."""

from __future__ import annotations

import dataclasses
import json

from .artifact import Artifact, FullForm
from .errors import KvcalError
from .manifest import manifest_bytes
from .schema import SLIM_LEAVES_OUT
from .tensor_file import TensorFile


def slim(artifact: Artifact) -> Artifact:
    """A copy without the moments and the reservoir, which only calibration uses; `save` it to a folder of its own.

    What stays keeps its bytes and hashes, and the manifest keeps those of what is left out, under the content hash of
    the full artifact. One that is slim already, or has neither stage, is returned as it is.

    Raises:
        KvcalError: the artifact has something that was not saved and so has no hash, or nothing else than these stages.
    """
    kept = {name: stage for name, stage in artifact.stages.items() if name not in SLIM_LEAVES_OUT}
    if artifact.slim_of is not None or len(kept) == len(artifact.stages):
        return artifact
    if not kept:
        raise KvcalError(f"{artifact.name}: has nothing to decode with: calibrate again with `calibrate pca`")
    files = {
        name: stage.tensors.file for name, stage in artifact.stages.items() if isinstance(stage.tensors, TensorFile)
    }
    if len(files) < len(artifact.stages) or artifact.content_hash is None:
        raise KvcalError(f"{artifact.name}: was not saved yet, and its slim form names hashes of files: save it first")
    content, content_hash = manifest_bytes(artifact, files)
    if content_hash != artifact.content_hash:
        raise KvcalError(
            f"{artifact.name}: has another content ({content_hash[:12]}…) when written again by this kvcal: "
            "make it slim with the kvcal that made it"
        )
    told = json.loads(content)
    full = FullForm(content_hash, told["schema_version"], told["stages"])
    return dataclasses.replace(artifact, stages=kept, slim_of=full)


def made_after(artifact: Artifact) -> list[str]:
    """Stages of a saved slim artifact that are not the full one's, byte for byte, ascending."""
    full = artifact.slim_of.stages if artifact.slim_of else {}
    files = {name: stage.tensors.file for name, stage in artifact.stages.items()}  # type: ignore[attr-defined]
    return sorted(name for name, file in files.items() if full.get(name, {}).get("sha256") != file.sha256)
