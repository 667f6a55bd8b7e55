"""A compressed cache on disk: one safetensors file whose header says which model, artifact and methods it is of."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ...artifacts import Artifact, KvcalError, differences, fingerprint
from ...artifacts.plain_files import read_plain
from ...artifacts.syncing import make_folder
from ...artifacts.weights import model_state, sample, update_digest
from ...artifacts.writing import write_atomically
from ..cla.sharing_map import SharingMap
from ..methods import METHODS, Method

FILE = "cache.safetensors"
_VERSION = 5
_MOST_HEADER = 16 << 20
"""Bytes."""


def write_snapshot(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    model: Any,
    methods: Mapping[int, Method],
    artifact: Artifact | None,
    groups: SharingMap,
) -> None:
    """Raises KvcalError: the artifact has no hash for `read_snapshot` to know it by, or the file cannot be written."""
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
    on_cpu = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    content = save(on_cpu, {"kvcal": json.dumps({**header, "sha256": _digest(header, on_cpu)})})
    try:
        make_folder(place)
    except OSError as error:
        raise KvcalError(f"{place}: the cache cannot be saved there ({error}): give another folder") from error
    write_atomically(place / FILE, content)


def read_snapshot(
    folder: str | os.PathLike[str], model: Any, artifact: Artifact | None, groups: SharingMap
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors on the CPU, the methods by layer). They are what was written, which says nothing of who wrote it: see
    `check_layers`.

    Raises:
        KvcalError: no such file, damaged, or of another model or artifact.
    """
    path = Path(folder) / FILE
    try:
        header, tensors = _read(path)
        version, identity, wanted, methods = (header[key] for key in ("version", "model", "artifact", "methods"))
        weights, digest = header["weights"], header["sha256"] if version == _VERSION else None
        if not isinstance(identity, dict) or not isinstance(methods, dict):
            raise TypeError("its header has other fields")
    except (FileNotFoundError, NotADirectoryError):
        raise KvcalError(f"{path}: no saved cache there: write one with cache.save(folder)") from None
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, RecursionError, MemoryError) as error:
        raise damaged(folder, error) from error
    if version != _VERSION:
        raise KvcalError(f"{path}: saved by another version of kvcal ({version}, this one reads {_VERSION})")
    if digest != _digest(header, tensors):
        raise damaged(folder, ValueError("it is not what was written"))
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


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(our header, all tensors), read once: a mapped file that is cut off or overwritten meanwhile would end the
    process, or change what was checked."""
    content = read_plain(path)
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > min(len(content) - 8, _MOST_HEADER):
        raise ValueError("its header is longer than the file, or than any of ours")
    header = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["kvcal"])
    if not isinstance(header, dict):
        raise TypeError("its header is no object")
    return header, load(content)


def _digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    told = {name: value for name, value in header.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        update_digest(digest, tensor)
    return digest.hexdigest()
