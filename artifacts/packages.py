"""Packages that only a part of kvcal needs, and how they are installed: named in one line where one is missing."""

from __future__ import annotations

import sys
from importlib.util import find_spec

from .errors import MissingPackageError

EXTRAS = {
    "transformers": ("transformers", "huggingface_hub", "tokenizers"),
    "models": ("gguf",),
    "eval": ("lm_eval",),
    "calibrate": (
        *("accelerate", "altair", "click", "datasets", "faiss", "jinja2", "matplotlib", "numpy", "rich", "sklearn"),
        *("threadpoolctl", "vl_convert", "yaml"),
    ),
}
"""Extra of kvcal -> packages that it brings, by the name that is imported."""


def require(*packages: str, to: str) -> None:
    """Raise MissingPackageError where one of these is not installed; imports none of them.

    Args:
        packages: by the name that is imported.
        to: what cannot be done without it, e.g. "calibrate a model".
    """
    for package in packages:
        if not installed(package):
            raise missing(package, to)


def installed(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    if package in sys.modules:
        return sys.modules[package] is not None
    return find_spec(package) is not None


def missing(package: str, to: str, extra: str | None = None) -> MissingPackageError:
    """The error that names a package, what needs it and the line that installs it.

    Args:
        extra: what brings all that is needed beside it; None: the extra of the package alone.
    """
    extra = extra or extra_of(package)
    line = f"pip install 'kvcal[{extra}]'" if extra else f"pip install {package}"
    either = " (on a GPU: 'kvcal[gpu]')" if extra == "calibrate" else ""
    return MissingPackageError(f"{package} is not installed, and is needed to {to}: {line}{either}")


def extra_of(package: str) -> str | None:
    """The extra that brings a package or one of its modules ("yaml.reader"); None: none does."""
    name = package.partition(".")[0]
    return next((extra for extra, packages in EXTRAS.items() if name in packages), None)
