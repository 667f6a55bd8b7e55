"""Calibration artifacts: a folder with a manifest and one safetensors file per stage (docs/format.md).

Errors are here at once; all else, and torch with it, is imported when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import ArtifactError, KvcalError, MismatchError

if TYPE_CHECKING:
    from .architecture import differences, fingerprint
    from .artifact import Artifact, Layer, ModelIdentity, Stage
    from .folder import load, save
    from .schema import QUANTITIES, SCHEMA_VERSION
    from .weights import weights_sha256

_PLACES = {
    "QUANTITIES": "schema",
    "SCHEMA_VERSION": "schema",
    "Artifact": "artifact",
    "Layer": "artifact",
    "ModelIdentity": "artifact",
    "Stage": "artifact",
    "differences": "architecture",
    "fingerprint": "architecture",
    "load": "folder",
    "save": "folder",
    "weights_sha256": "weights",
}

__all__ = [
    "QUANTITIES",
    "SCHEMA_VERSION",
    "Artifact",
    "ArtifactError",
    "KvcalError",
    "Layer",
    "MismatchError",
    "ModelIdentity",
    "Stage",
    "differences",
    "fingerprint",
    "load",
    "save",
    "weights_sha256",
]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(import_module(f".{_PLACES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
