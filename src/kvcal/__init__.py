"""Calibrate a language model's KV cache once, offline; decode from a compressed or sparse one.

    from kvcal.calibrate import calibrate

    artifact = calibrate("smollm2-135m", "text/")
    artifact.save_pretrained("smollm2-135m-text")

and, where the model is served,

    import kvcal

    with kvcal.compress(model, kvcal.load("smollm2-135m-text"), method="spectral"):
        model.generate(**inputs)

`kvcal.artifacts` is what is saved, `kvcal.runtime` decodes with it, `kvcal.calibrate` makes it. Nothing is imported
before it is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import artifacts, calibrate, kernels, runtime
    from .artifacts import Artifact, KvcalError
    from .runtime.decode import decode
    from .runtime.integration.contexts import compress
    from .runtime.loading import load

__version__ = "0.1.0"

_ROOMS = ("artifacts", "calibrate", "kernels", "runtime")
_NAMES = ("Artifact", "KvcalError", "compress", "decode", "load")

__all__ = [
    "Artifact",
    "KvcalError",
    "__version__",
    "artifacts",
    "calibrate",
    "compress",
    "decode",
    "kernels",
    "load",
    "runtime",
]

if not TYPE_CHECKING:  # a type checker would take any name for one of ours

    def __getattr__(name: str) -> Any:
        if name in _ROOMS:
            return import_module(f".{name}", __name__)
        if name in _NAMES:
            return getattr(import_module(".runtime", __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted(__all__)
