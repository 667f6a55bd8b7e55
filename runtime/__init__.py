"""From an artifact to attention. Imports torch, safetensors and our own ground floor only."""

from ..artifacts import Artifact, ArtifactError, KvcalError, MismatchError
from .loading import check_model, load

__all__ = ["Artifact", "ArtifactError", "KvcalError", "MismatchError", "check_model", "load"]
