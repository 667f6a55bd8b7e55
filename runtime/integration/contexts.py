"""`compress`, `enable` and `disable`."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ...artifacts import Artifact, KvcalError
from ..cla import Cla, resolve, split_method
from .attachment import attach, attached
from .cache import CompressedCache, Recipe, check_artifact
from .sharing import Sharing, share, sharing_of


@contextmanager
def compress(model: Any, artifact: Artifact | None = None, method: Any = None, **settings: Any) -> Iterator[None]:
    """Inside, `generate()` and forward calls with a cache decode from a compressed one, with no further argument.

    Args:
        model: a transformers decoder.
        artifact: of `load()`, for the methods that need one. That it fits is checked by architecture; by weights, which
            takes seconds per GB, with `check_model(artifact, model, weights=True)`.
        method: a name in METHODS, or names by layer: `{"0-1": "full", "2-": "loki"}`, or a list; "cla", "cla+loki",
            …: neighbouring layers share keys and values inside, and the model is restored on leaving. None: the
            artifact's plan, if it has one (see `calibrate plan`), else "loki"; "plan" insists on it.
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


def enable(model: Any, artifact: Artifact | None = None, method: Any = None, **settings: Any) -> None:
    """What `compress` does on entering."""
    found = attached(model)
    if found is not None and found.begin is not None:
        raise KvcalError("this model is already compressed: leave the other compress(), or call disable() first")
    cla, method, settings = split_method(method, settings)
    sharing = _share(model, artifact, cla) if cla else None
    try:
        recipe = Recipe.of(model, artifact, method, settings)
        entered = attach(model)
    except BaseException:
        if sharing:
            sharing.remove()
        raise
    owner = weakref.ref(model)
    entered.begin, entered.sharing = lambda: CompressedCache.of(owner(), recipe), sharing


def disable(model: Any) -> None:
    """What `compress` does on leaving; caches that live on keep working, but for `cla`'s, which need its sharing."""
    found = attached(model)
    if found is None or found.begin is None:
        raise KvcalError("this model is not compressed: call enable() first")
    if found.sharing:
        found.sharing.remove()
    found.begin = found.sharing = None
    found.release()


@contextmanager
def shared_for(
    model: Any, artifact: Artifact | None, method: Any, settings: Mapping[str, Any]
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The part of a method that changes the model: inside, its layers share what `cla` says, if it says so.

    Yields:
        (method, settings) for a `CompressedCache` of what is left: of "cla+loki", those of "loki".
    """
    cla, method, settings = split_method(method, settings)
    sharing = _share(model, artifact, cla) if cla else None
    try:
        yield method, settings
    finally:
        if sharing:
            sharing.remove()


def _share(model: Any, artifact: Artifact | None, cla: Cla) -> Sharing:
    if (already := sharing_of(model)) is not None:
        raise KvcalError(
            f"this model's layers share keys and values already ({already.map}): take the method after the + alone, "
            "or remove that sharing first"
        )
    check_artifact(artifact, model)
    found = resolve(cla, artifact)
    sharing = share(model, found.map, pool=found.pool, weights=found.weights)
    sharing.bases = found.bases if found.map.shared else None  # else keys are the artifact's own
    return sharing
