"""Public names that are imported when they are first asked for (PEP 562), so that a light import stays light."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from .packages import extra_of, missing


def lazy_names(
    package: str, modules: Mapping[str, str], public: list[str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """A package's `__getattr__` and `__dir__`.

    Args:
        package: its `__name__`.
        modules: name -> the module below the package that defines it, e.g. {"compress": "integration.contexts"}.
        public: its `__all__`.

    Returns:
        Functions that raise AttributeError for unknown names, and MissingPackageError where a name's module needs a
        package that an extra of kvcal brings.
    """

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            return getattr(import_module(f".{modules[name]}", package), name)
        except ModuleNotFoundError as error:
            if extra_of(error.name or "") is None:
                raise
            raise missing(str(error.name).partition(".")[0], f"use {package}.{name}") from error

    return get, lambda: sorted(public)
