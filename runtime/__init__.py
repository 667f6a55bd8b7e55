"""From an artifact to attention. The core imports torch, safetensors and our own ground floor only; what needs
transformers is loaded when it is first asked for."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..artifacts import Artifact, ArtifactError, KvcalError, MismatchError
from .cla.sharing_map import SharingMap
from .decode import Decoded, decode
from .loading import check_model, load
from .methods import METHODS
from .sampling import Sampler
from .store import Store

if TYPE_CHECKING:
    from .cla.checkpoint import load_cla
    from .cla.folder import save_cla
    from .cla.sharing import Sharing, share, shared, sharing_of
    from .integration.cache import CompressedCache
    from .integration.contexts import compress, disable, enable, shared_for

_WITH_TRANSFORMERS = {
    "CompressedCache": "integration.cache",
    "compress": "integration.contexts",
    "disable": "integration.contexts",
    "enable": "integration.contexts",
    "load_cla": "cla.checkpoint",
    "save_cla": "cla.folder",
    "Sharing": "cla.sharing",
    "share": "cla.sharing",
    "shared": "cla.sharing",
    "shared_for": "integration.contexts",
    "sharing_of": "cla.sharing",
}

__all__ = [
    "METHODS",
    "Artifact",
    "ArtifactError",
    "CompressedCache",
    "Decoded",
    "KvcalError",
    "MismatchError",
    "Sampler",
    "Sharing",
    "SharingMap",
    "Store",
    "check_model",
    "compress",
    "decode",
    "disable",
    "enable",
    "load",
    "load_cla",
    "save_cla",
    "share",
    "shared",
    "shared_for",
    "sharing_of",
]


def __getattr__(name: str) -> Any:
    if name in _WITH_TRANSFORMERS:
        return getattr(import_module(f".{_WITH_TRANSFORMERS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
