"""Calibration artifacts: a folder with a manifest and one safetensors file per stage (docs/format.md).

Errors are here at once; all else, and torch with it, is imported when it is first asked for.
"""

from typing import TYPE_CHECKING

from .errors import ArtifactError, KvcalError, MismatchError, MissingPackageError
from .lazy import lazy_names

if TYPE_CHECKING:
    from .architecture import differences, fingerprint
    from .artifact import Artifact, FullForm, Layer, ModelIdentity, Stage
    from .folder import load, save
    from .schema import QUANTITIES, SCHEMA_VERSION
    from .slim_form import slim
    from .weights import weights_sha256

__all__ = [
    "QUANTITIES",
    "SCHEMA_VERSION",
    "Artifact",
    "ArtifactError",
    "FullForm",
    "KvcalError",
    "Layer",
    "MismatchError",
    "MissingPackageError",
    "ModelIdentity",
    "Stage",
    "differences",
    "fingerprint",
    "load",
    "save",
    "slim",
    "weights_sha256",
]

if not TYPE_CHECKING:  # a type checker would take any name for one of ours
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "QUANTITIES": "schema",
            "SCHEMA_VERSION": "schema",
            "Artifact": "artifact",
            "FullForm": "artifact",
            "Layer": "artifact",
            "ModelIdentity": "artifact",
            "Stage": "artifact",
            "differences": "architecture",
            "fingerprint": "architecture",
            "load": "folder",
            "save": "folder",
            "slim": "slim_form",
            "weights_sha256": "weights",
        },
        __all__,
    )
