"""Calibration artifacts: a folder with a manifest and one safetensors file per stage (docs/format.md)."""

from .artifact import Artifact, Layer, ModelIdentity, Stage
from .errors import ArtifactError, KvcalError, MismatchError, MissingPackageError
from .fingerprint import differences, fingerprint
from .folder import load, save
from .schema import QUANTITIES, SCHEMA_VERSION
from .weights import weights_sha256

__all__ = [
    "QUANTITIES",
    "SCHEMA_VERSION",
    "Artifact",
    "ArtifactError",
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
    "weights_sha256",
]
