"""`compress`, `enable` and `disable`."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ...artifacts import Artifact, KvcalError
from ..cla.method import Cla, resolve, split_method
from ..cla.sharing import Sharing, share_for, sharing_of
from ..typed import MethodArgument, Settings
from ..wrapped import unwrapped
from .attachment import Compressed, attach, attached
from .cache import Blueprint, CompressedCache, check_artifact
from .entering import Entry, enter, leave

if TYPE_CHECKING:
    from typing_extensions import Unpack


@contextmanager
def compress(
    model: Any, artifact: Artifact | None = None, method: MethodArgument = None, **settings: Unpack[Settings]
) -> Iterator[None]:
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
        KvcalError: something of this does not fit; raised before any token is decoded.
    """
    model = unwrapped(model)  # once: what is in a wrapper may be exchanged inside
    asked = _enable(model, artifact, method, settings)
    try:
        yield
    finally:
        attachment = attached(model)
        if attachment is not None and attachment.compressed is asked:  # else disable() was called meanwhile
            disable(model)


def enable(
    model: Any, artifact: Artifact | None = None, method: MethodArgument = None, **settings: Unpack[Settings]
) -> None:
    """What `compress` does on entering."""
    _enable(model, artifact, method, settings)


def _enable(model: Any, artifact: Artifact | None, method: Any, settings: Mapping[str, Any]) -> Compressed:
    model = unwrapped(model)
    entry = enter(model)
    sharing = None
    try:
        cla, method, settings = split_method(method, settings)
        sharing = _share(model, artifact, cla, entry) if cla else None
        blueprint = Blueprint.of(model, artifact, method, settings)
        attachment = attach(model)
    except BaseException:
        if sharing:
            sharing.remove()
        leave(model, entry)
        raise
    owner = weakref.ref(model)
    attachment.compressed = Compressed(lambda: CompressedCache.of(owner(), blueprint), sharing, entry)
    return attachment.compressed


def disable(model: Any) -> None:
    """What `compress` does on leaving; caches that live on keep working, but for `cla`'s, which need its sharing."""
    model = unwrapped(model)
    attachment = attached(model)
    asked = attachment.take_compressed() if attachment else None
    if attachment is None or asked is None:
        raise KvcalError("this model is not compressed: call enable() first")
    if asked.sharing:
        asked.sharing.remove()
    if attachment.calls is not None:
        attachment.calls.forget_own()
    attachment.release()
    leave(model, asked.entry)


@contextmanager
def shared_for(
    model: Any, artifact: Artifact | None, method: Any, settings: Mapping[str, Any]
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Apply the part of a method that changes the model: inside, layers share keys and values if `cla` is part of it.

    Yields:
        (method, settings) of what is left, for a `CompressedCache`: of "cla+loki", those of "loki".
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
    resolved = resolve(cla, artifact)
    sharing = share_for(entry, model, resolved.map, resolved.pool, resolved.weights)
    sharing.bases = resolved.bases if resolved.map.shared else None  # else keys are the artifact's own
    return sharing
