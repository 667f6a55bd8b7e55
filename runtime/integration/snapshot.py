"""A compressed cache on disk: one safetensors file whose header says which model, artifact and methods it is of."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ...artifacts import Artifact, KvcalError, differences, fingerprint
from ...artifacts.folder import write_atomically
from ...artifacts.weights import model_state, sample, update_digest
from ..sharing import SharingMap
from ..stores import METHODS, Method

FILE = "cache.safetensors"
_VERSION = 2


def write_snapshot(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    model: Any,
    methods: Mapping[int, Method],
    artifact: Artifact | None,
    groups: SharingMap,
) -> None:
    """Raises KvcalError: the artifact has no hash that `read_snapshot` could tell it by, or the disk takes no file."""
    if artifact is not None and artifact.content_hash is None:
        raise KvcalError(f"{Path(folder)}: a saved cache names its artifact by its hash: save the artifact first")
    names = {kind: name for name, kind in METHODS.items()}
    header = {
        "version": _VERSION,
        "model": fingerprint(model.config),
        "weights": sample(model_state(model)),
        "shared": str(groups) if groups.shared else None,
        "artifact": artifact.content_hash if artifact else None,
        "methods": {
            str(layer): {"method": names[type(method)], **dataclasses.asdict(method)}
            for layer, method in methods.items()
        },
    }
    place = Path(folder)
    here = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    content = save(here, {"kvcal": json.dumps({**header, "sha256": _digest(here)})})
    try:
        place.mkdir(parents=True, exist_ok=True)
        write_atomically(place / FILE, content)
    except OSError as error:
        raise KvcalError(f"{place}: the cache cannot be saved there ({error}): give another folder") from error


def read_snapshot(
    folder: str | os.PathLike[str], model: Any, artifact: Artifact | None, groups: SharingMap
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors on the model's device, the methods by layer).

    Raises:
        KvcalError: no such file, damaged, or of another model or artifact.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise KvcalError(f"{path}: no saved cache there: write one with cache.save(folder)")
    try:
        with safe_open(path, framework="pt", device=str(model.device)) as file:
            header = json.loads((file.metadata() or {})["kvcal"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        version, identity, wanted, methods = (header[key] for key in ("version", "model", "artifact", "methods"))
        weights, digest = header["weights"], header["sha256"] if version == _VERSION else None
        if not isinstance(identity, dict) or not isinstance(methods, dict):
            raise TypeError("its header has other fields")
    except (SafetensorError, OSError, ValueError, LookupError, TypeError) as error:
        raise damaged(folder, error) from error
    if version != _VERSION:
        raise KvcalError(f"{path}: saved by another version of kvcal ({version}, this one reads {_VERSION})")
    if digest != _digest(tensors):
        raise damaged(folder, ValueError("its tensors are not those that were written"))
    different = differences(identity, fingerprint(model.config))
    for name, ours, theirs in sorted(different, key=lambda entry: entry[0] != "model_type"):
        raise KvcalError(f"{path}: was saved with a model of {name} {ours}, this model has {theirs}")
    shared = str(groups) if groups.shared else None
    if header.get("shared") != shared:
        raise KvcalError(
            f"{path}: was saved when layers shared keys and values in groups {header.get('shared')}, this model's "
            f"groups are {shared}: load it within the compress() or shared() of before"
        )
    if weights != sample(model_state(model)):
        raise KvcalError(f"{path}: was saved with other weights, or in another dtype, of the same architecture")
    if wanted != (artifact.content_hash if artifact else None):
        raise KvcalError(
            f"{path}: was saved with artifact {wanted}, given is {artifact.content_hash if artifact else None}"
        )
    return tensors, methods


def damaged(folder: str | os.PathLike[str], error: Exception) -> KvcalError:
    return KvcalError(f"{Path(folder) / FILE}: not a saved cache, or damaged ({error}): save it again")


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        update_digest(digest, tensor.cpu())
    return digest.hexdigest()
