"""From an artifact to attention: what a program that decodes needs.

Everything else has its place below: layers that share keys and values in `kvcal.runtime.cla`, a compressed cache
without a `with` block (`enable`, `disable`) in `kvcal.runtime.integration`, the plugin of vLLM in
`kvcal.runtime.engines`. The core imports torch, safetensors and our own ground floor only; what needs transformers is
imported when it is first asked for.
"""

from typing import TYPE_CHECKING

from ..artifacts import Artifact, ArtifactError, KvcalError, MismatchError, MissingPackageError
from ..artifacts.lazy import lazy_names
from .decode import decode
from .loading import check_model, load
from .methods import METHODS
from .sampling import Sampler

if TYPE_CHECKING:
    from .integration.cache import CompressedCache
    from .integration.contexts import compress

__all__ = [
    "METHODS",
    "Artifact",
    "ArtifactError",
    "CompressedCache",
    "KvcalError",
    "MismatchError",
    "MissingPackageError",
    "Sampler",
    "check_model",
    "compress",
    "decode",
    "load",
]

if not TYPE_CHECKING:  # a type checker would take any name for one of ours
    __getattr__, __dir__ = lazy_names(
        __name__, {"CompressedCache": "integration.cache", "compress": "integration.contexts"}, __all__
    )
