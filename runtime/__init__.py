"""From an artifact to attention. The core imports torch, safetensors and our own ground floor only; what needs
transformers is loaded when it is first asked for."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..artifacts import Artifact, ArtifactError, KvcalError, MismatchError
from .decode import Decoded, decode
from .loading import check_model, load
from .methods import METHODS
from .sampling import Sampler
from .sharing import SharingMap
from .store import Store

if TYPE_CHECKING:
    from .integration.cache import CompressedCache
    from .integration.checkpoint import load_cla
    from .integration.cla_folder import save_cla
    from .integration.contexts import compress, disable, enable, shared_for
    from .integration.sharing import Sharing, share, shared, sharing_of

_INTEGRATION = {
    "CompressedCache": "cache",
    "compress": "contexts",
    "disable": "contexts",
    "enable": "contexts",
    "load_cla": "checkpoint",
    "save_cla": "cla_folder",
    "Sharing": "sharing",
    "share": "sharing",
    "shared": "sharing",
    "shared_for": "contexts",
    "sharing_of": "sharing",
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
    if name in _INTEGRATION:
        return getattr(import_module(f".integration.{_INTEGRATION[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
