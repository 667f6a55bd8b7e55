"""From an artifact to attention. The core imports torch, safetensors and our own ground floor only; what needs
transformers is loaded when it is first asked for."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..artifacts import Artifact, ArtifactError, KvcalError, MismatchError
from .loading import check_model, load
from .stores import METHODS, Store

if TYPE_CHECKING:
    from .integration.cache import CompressedCache
    from .integration.contexts import compress, disable, enable

_INTEGRATION = {"CompressedCache": "cache", "compress": "contexts", "disable": "contexts", "enable": "contexts"}

__all__ = [
    "METHODS",
    "Artifact",
    "ArtifactError",
    "CompressedCache",
    "KvcalError",
    "MismatchError",
    "Store",
    "check_model",
    "compress",
    "disable",
    "enable",
    "load",
]


def __getattr__(name: str) -> Any:
    if name in _INTEGRATION:
        return getattr(import_module(f".integration.{_INTEGRATION[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
