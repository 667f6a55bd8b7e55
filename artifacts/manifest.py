"""manifest.json: written in one canonical form, read with suspicion."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .artifact import Artifact, FullForm, Layer, ModelIdentity
from .errors import ArtifactError
from .missing import does_not_exist
from .plain_files import read_plain
from .schema import LAYER_TENSORS, SCHEMA_VERSION, SLIM_SINCE, STAGE_SINCE, version_of
from .tensor_file import StageFile

MANIFEST = "manifest.json"
FORMAT = "kvcal"
_MAX_BYTES = 16 * 1024 * 1024
_MOST_LEVELS = 400
FILE_NAME = re.compile(r"[a-z][a-z0-9_]{0,40}\.[0-9a-f]{8}\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def manifest_bytes(artifact: Artifact, files: Mapping[str, StageFile]) -> tuple[bytes, str]:
    """(the manifest of `artifact` as it is written, its content hash)."""
    tensors = {name: stage.tensors for name, stage in artifact.stages.items()}
    body = {
        "format": FORMAT,
        "schema_version": version_of(tensors, artifact.layers, slim=artifact.slim_of is not None),
        "model": dataclasses.asdict(artifact.model),
        "layers": [dataclasses.asdict(layer) for layer in artifact.layers],
        "data": artifact.data,
        "settings": artifact.settings,
        "versions": artifact.versions,
        "stages": {
            name: {**dataclasses.asdict(files[name]), "settings": stage.settings}
            for name, stage in artifact.stages.items()
        },
    }
    if artifact.slim_of is not None:
        body["slim_of"] = dataclasses.asdict(artifact.slim_of)
    content_hash = _content_hash(body)
    text = json.dumps({**body, "content_hash": content_hash}, indent=1, sort_keys=True) + "\n"
    return text.encode(), content_hash


def read_manifest(folder: Path) -> tuple[Artifact, dict[str, StageFile], dict[str, Mapping[str, Any]]]:
    """Parse and check manifest.json: (artifact without stages, file of each stage, settings of each stage).

    Raises:
        ArtifactError: not an artifact, a newer schema, or anything malformed; one line.
    """
    path = folder / MANIFEST
    try:
        content = read_plain(path, _MAX_BYTES)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a zero byte in the path
        make = f"make one with `calibrate pca --output {folder}`"
        if not _exists(folder):
            raise ArtifactError(does_not_exist(folder, make)) from None
        give = "give the folder of one, or make one with `calibrate pca`"
        raise ArtifactError(f"{folder}: not an artifact (no {MANIFEST}): {give}") from None
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror}): fetch the artifact again") from error
    return parse_manifest(folder, content)


def _exists(folder: Path) -> bool:
    try:
        return folder.exists()
    except (OSError, ValueError):
        return False


def parse_manifest(folder: Path, content: bytes) -> tuple[Artifact, dict[str, StageFile], dict[str, Mapping[str, Any]]]:
    """`read_manifest` of content that is, or is going to be, in manifest.json."""
    path = folder / MANIFEST
    body = _parse(path, content)
    if body.get("format") != FORMAT:
        raise ArtifactError(f"{path}: not a kvcal manifest (format {body.get('format')!r}, expected {FORMAT!r})")
    version = body.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ArtifactError(f"{path}: schema_version is {version!r}, expected a positive whole number")
    if version > SCHEMA_VERSION:
        raise ArtifactError(
            f"{path}: schema {version} is newer than this kvcal reads ({SCHEMA_VERSION}): upgrade kvcal to read it"
        )
    stated = body.pop("content_hash", None)
    if stated != _content_hash(body):
        raise ArtifactError(f"{path}: content hash does not match, the manifest was changed or damaged: fetch it again")
    try:
        return _build(folder, body, stated)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{path}: malformed manifest ({type(error).__name__}: {error}): fetch it again") from error


def _build(
    folder: Path, body: dict[str, Any], content_hash: str
) -> tuple[Artifact, dict[str, StageFile], dict[str, Mapping[str, Any]]]:
    for name, kind in (("layers", list), ("stages", dict), ("data", dict), ("settings", dict), ("versions", dict)):
        if not isinstance(body[name], kind):
            raise ValueError(f"{name}: expected {'a list' if kind is list else 'an object'}")
    layers = tuple(_layer(index, fields) for index, fields in enumerate(body["layers"]))
    identity = ModelIdentity(**body["model"])
    if not layers:
        raise ValueError("no layers")
    if not isinstance(identity.id, str) or not isinstance(identity.fingerprint, dict):
        raise ValueError("model: id or fingerprint")
    if not isinstance(identity.revision, (str, type(None))):
        raise ValueError("model: revision")
    if not all(isinstance(version, str) for version in body["versions"].values()):
        raise ValueError("versions: expected texts")
    if not _SHA256.fullmatch(identity.weights_sha256):
        raise ValueError("model: weights_sha256")
    files, settings = _stages(body["stages"], body["schema_version"])
    data = body["data"]
    counts = [data[name] for name in ("blocks", "seq_len", "tokens_counted")]
    if not isinstance(data["source"], dict) or not _SHA256.fullmatch(data["content_sha256"]):
        raise ValueError("data: source or content_sha256")
    if any(type(count) is not int or not 0 <= count < 1 << 63 for count in counts):
        raise ValueError("data: blocks, seq_len or tokens_counted")
    artifact = Artifact(
        model=identity,
        layers=layers,
        data=dict(data),
        settings=dict(body["settings"]),
        versions=dict(body["versions"]),
        stages={},
        folder=folder,
        content_hash=content_hash,
        slim_of=_full_form(body),
    )
    return artifact, files, settings


def _stages(entries: Mapping[str, Any], version: int) -> tuple[dict[str, StageFile], dict[str, Mapping[str, Any]]]:
    """(file, settings) of each stage."""
    files: dict[str, StageFile] = {}
    settings: dict[str, Mapping[str, Any]] = {}
    for name, entry in entries.items():
        if name not in LAYER_TENSORS:
            raise ValueError(f"unknown stage {name!r}, schema {SCHEMA_VERSION} has {', '.join(LAYER_TENSORS)}")
        if version < STAGE_SINCE.get(name, 1):
            raise ValueError(f"stage {name!r} in schema {version}, which has none")
        # Only plain names of our own making: no folders, no "..", no formats that can run code.
        if not FILE_NAME.fullmatch(str(entry["file"])):
            raise ValueError(f"stage {name}: file name {entry['file']!r}")
        if not _SHA256.fullmatch(entry["sha256"]) or type(entry["bytes"]) is not int:
            raise ValueError(f"stage {name}: sha256 or bytes")
        files[name] = StageFile(entry["file"], entry["sha256"], entry["bytes"])
        if not isinstance(entry["settings"], dict):
            raise ValueError(f"stage {name}: settings")
        settings[name] = entry["settings"]
    return files, settings


def _full_form(body: dict[str, Any]) -> FullForm | None:
    """Of a slim artifact: what it says of the full one has to be what that one's content hash is of."""
    if "slim_of" not in body:
        return None
    if body["schema_version"] < SLIM_SINCE:
        raise ValueError(f"slim_of in schema {body['schema_version']}, which has none")
    full = FullForm(**body["slim_of"])
    if type(full.schema_version) is not int:
        raise ValueError(f"slim_of: schema_version {full.schema_version!r}")
    _stages(full.stages, full.schema_version)
    was = {**body, "schema_version": full.schema_version, "stages": full.stages}
    del was["slim_of"]
    if _content_hash(was) != full.content_hash:
        raise ValueError("slim_of: is not of the content that it names")
    return full


def _layer(index: int, fields: dict[str, Any]) -> Layer:
    layer = Layer(**fields)
    sizes = (layer.kv_heads, layer.query_heads, layer.head_dim, layer.value_dim)
    if layer.index != index or not all(map(_is_size, sizes)):
        raise ValueError(f"layer {index}: index and sizes")
    if type(layer.scaling) not in (int, float) or not 1e-30 < layer.scaling < 1e30:
        raise ValueError(f"layer {index}: scaling")
    if not (layer.window is None or _is_size(layer.window)):
        raise ValueError(f"layer {index}: window")
    if layer.pre_rotary not in ("unrotate", "replay", "none"):
        raise ValueError(f"layer {index}: pre_rotary {layer.pre_rotary!r}")
    if layer.query_heads % layer.kv_heads:
        raise ValueError(f"layer {index}: {layer.query_heads} query heads over {layer.kv_heads} KV heads")
    return layer


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def _parse(path: Path, content: bytes) -> dict[str, Any]:
    if len(content) > _MAX_BYTES:
        raise ArtifactError(f"{path}: larger than the {_MAX_BYTES} bytes of a manifest")
    try:
        body = json.loads(content)
        # json.loads takes more than JSON: NaN, and lone surrogates, which no file or terminal can hold.
        _check_levels(body, _MOST_LEVELS)
        json.dumps(body, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: not valid JSON ({error}): fetch or calibrate it again") from error
    if not isinstance(body, dict):
        raise ArtifactError(f"{path}: not a kvcal manifest (a JSON object is expected)")
    return body


def _check_levels(value: Any, most: int) -> None:
    """Raise ValueError for lists and objects inside one another so deep that writing them again would fail."""
    if most == 0:
        raise ValueError(f"more than {_MOST_LEVELS} levels")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_levels(item, most - 1)


def _content_hash(body: Mapping[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()
