"""Calibration artifacts: a folder with a manifest and one safetensors file per stage (docs/format.md)."""

from .artifact import Artifact, FullForm, Layer, ModelIdentity, Stage
from .errors import ArtifactError, KvcalError, MismatchError
from .fingerprint import differences, fingerprint
from .folder import load, save
from .schema import QUANTITIES, SCHEMA_VERSION
from .slim import slim
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
    "ModelIdentity",
    "Stage",
    "differences",
    "fingerprint",
    "load",
    "save",
    "slim",
    "weights_sha256",
]
