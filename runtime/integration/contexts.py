"""`compress`, `enable` and `disable`."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ...artifacts import Artifact, KvcalError
from ..cla import Cla, resolve, split_method
from ..wrapped import unwrapped
from .attachment import Compressed, attach, attached
from .cache import CompressedCache, Recipe, check_artifact
from .entering import Entry, enter, leave
from .sharing import Sharing, share_for, sharing_of


@contextmanager
def compress(model: Any, artifact: Artifact | None = None, method: Any = None, **settings: Any) -> Iterator[None]:
    """Inside, `generate()` and forward calls with a cache decode from a compressed one, with no further argument.

    That is for the thread and the asyncio task that enter, and for tasks that they start; calls from others get what
    the model is (with `cla`, an error). In any thread, a `CompressedCache` can be given to a call.

    Args:
        model: a transformers decoder, or a module around one (PEFT, `torch.compile`, …).
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
    model = unwrapped(model)  # once: what is in a wrapper may be exchanged inside
    asked = _enable(model, artifact, method, settings)
    try:
        yield
    finally:
        found = attached(model)
        if found is not None and found.compressed is asked:  # else disable() was called meanwhile
            disable(model)


def enable(model: Any, artifact: Artifact | None = None, method: Any = None, **settings: Any) -> None:
    """What `compress` does on entering."""
    _enable(model, artifact, method, settings)


def _enable(model: Any, artifact: Artifact | None, method: Any, settings: Mapping[str, Any]) -> Compressed:
    model = unwrapped(model)
    entry = enter(model)
    sharing = None
    try:
        cla, method, settings = split_method(method, settings)
        sharing = _share(model, artifact, cla, entry) if cla else None
        recipe = Recipe.of(model, artifact, method, settings)
        found = attach(model)
    except BaseException:
        if sharing:
            sharing.remove()
        leave(model, entry)
        raise
    owner = weakref.ref(model)
    found.compressed = Compressed(lambda: CompressedCache.of(owner(), recipe), sharing, entry)
    return found.compressed


def disable(model: Any) -> None:
    """What `compress` does on leaving; caches that live on keep working, but for `cla`'s, which need its sharing."""
    model = unwrapped(model)
    found = attached(model)
    asked = found.take_compressed() if found else None
    if found is None or asked is None:
        raise KvcalError("this model is not compressed: call enable() first")
    if asked.sharing:
        asked.sharing.remove()
    if found.calls is not None:
        found.calls.forget_own()
    found.release()
    leave(model, asked.entry)


@contextmanager
def shared_for(
    model: Any, artifact: Artifact | None, method: Any, settings: Mapping[str, Any]
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The part of a method that changes the model: inside, its layers share what `cla` says, if it says so.

    Yields:
        (method, settings) for a `CompressedCache` of what is left: of "cla+loki", those of "loki".
    """
    cla, method, settings = split_method(method, settings)
    if not cla:
        yield method, settings
        return
    entry = Entry()
    try:
        sharing = _share(unwrapped(model), artifact, cla, entry)
        try:
            yield method, settings
        finally:
            sharing.remove()
    finally:
        entry.leave()


def _share(model: Any, artifact: Artifact | None, cla: Cla, entry: Entry) -> Sharing:
    if (already := sharing_of(model)) is not None:
        raise KvcalError(
            f"this model's layers share keys and values already ({already.map}): take the method after the + alone, "
            "or remove that sharing first"
        )
    check_artifact(artifact, model)
    found = resolve(cla, artifact)
    sharing = share_for(entry, model, found.map, found.pool, found.weights)
    sharing.bases = found.bases if found.map.shared else None  # else keys are the artifact's own
    return sharing
