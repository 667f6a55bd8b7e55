"""`compress`, `enable` and `disable`."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ...artifacts import Artifact, KvcalError
from ..settings import DEFAULT_METHOD
from .attachment import attach, attached
from .cache import CompressedCache, Recipe


@contextmanager
def compress(
    model: Any, artifact: Artifact | None = None, method: Any = DEFAULT_METHOD, **settings: Any
) -> Iterator[None]:
    """Inside, `generate()` and forward calls with a cache decode from a compressed one, with no further argument.

    Args:
        model: a transformers decoder.
        artifact: of `load()`, for the methods that need one. That it fits is checked by architecture; by weights, which
            takes seconds per GB, with `check_model(artifact, model, weights=True)`.
        method: a name in METHODS, or names by layer: `{"0-1": "full", "2-": "loki"}`, or a list.
        settings: the method's parameters, each one value, a list by layer or a mapping of layer ranges;
            `dense_layers=n` leaves the first n layers `full`.

    Raises:
        KvcalError: before any token is decoded, whatever of this does not fit.
    """
    enable(model, artifact, method, **settings)
    entered = attached(model)
    begin = entered.begin if entered else None
    try:
        yield
    finally:
        if entered is not None and entered.begin is begin:  # else disable() was called meanwhile
            disable(model)


def enable(model: Any, artifact: Artifact | None = None, method: Any = DEFAULT_METHOD, **settings: Any) -> None:
    """What `compress` does on entering."""
    found = attached(model)
    if found is not None and found.begin is not None:
        raise KvcalError("this model is already compressed: leave the other compress(), or call disable() first")
    recipe = Recipe.of(model, artifact, method, settings)
    owner = weakref.ref(model)
    attach(model).begin = lambda: CompressedCache.of(owner(), recipe)


def disable(model: Any) -> None:
    """What `compress` does on leaving; caches that live on keep working."""
    found = attached(model)
    if found is None or found.begin is None:
        raise KvcalError("this model is not compressed: call enable() first")
    found.begin = None
    found.release()
