"""What is attached to a model while it is compressed or has compressed caches: our attention, and pre-hooks."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .attending import attached_name
from .calls import After, Before, InFlight
from .entering import Entry
from .generation import GenerationCheck
from .implementations import LOCK, Route, implementation, refuse_captured
from .rotation import Rotation, rotations
from .routing import backbone
from .support import attention_layers

if TYPE_CHECKING:
    from .sharing import Sharing


@dataclass
class Compressed:
    """What `compress` asks of a model's calls."""

    begin: Callable[[], Any]
    """Makes an empty cache for calls that would begin one."""
    sharing: Sharing | None
    """What the method `cla` did to the model, for as long as it is compressed."""
    entry: Entry


@dataclass
class Attachment:
    """A model with our attention and hooks, shared by the context and all caches of that model."""

    route: Route
    remove: Callable[[], None]
    """Takes hooks off the model."""
    checkpointed: weakref.WeakSet[Any]
    """Its parts that drop their cache while they train with gradient checkpointing."""
    rotations: list[Rotation]
    """Its rotary embeddings that depend on the number of tokens."""
    users: int = 0
    compressed: Compressed | None = None
    """None: only the model's caches are."""
    calls: InFlight | None = None
    """None: they may begin with our masks and go on with the model's own attention, which are of one kind."""
    _closed: bool = False

    def release(self) -> None:
        with LOCK:
            self.users -= 1
            self.close_unused()

    def close_unused(self) -> None:
        """Leave the model as it was found, once nobody needs it otherwise."""
        with LOCK:
            if self.users == 0 and not self.calls and not self._closed:
                self._closed = True
                self.remove()
                self.route.close()

    def take_compressed(self) -> Compressed | None:
        """What was asked of the model's calls, and no longer is."""
        with LOCK:
            found, self.compressed = self.compressed, None
        return found


_ATTACHED: weakref.WeakKeyDictionary[Any, Attachment] = weakref.WeakKeyDictionary()


def attached(model: Any) -> Attachment | None:
    return _ATTACHED.get(model)


def attach(model: Any) -> Attachment:
    with LOCK:
        found = _ATTACHED.get(model)
        if found is None:
            refuse_captured(model)
            attention_layers(model)  # refuses what cannot be attached to
            found = _ATTACHED[model] = _attach(model)
        found.route.renew()
        found.users += 1
        return found


def _attach(model: Any) -> Attachment:
    owner = weakref.ref(model)

    def now() -> Attachment | None:
        return None if (model := owner()) is None else _ATTACHED.get(model)

    own, found = implementation(model), rotations(model)
    route = Route(model, attached_name).open()
    # The backbone too: it may be called by itself.
    parts = weakref.WeakSet((model, backbone(model)))
    before, after = Before(now, owner, parts), After(now)
    calls = InFlight() if own != "sdpa" else None
    hooks: list[Any] = []
    try:
        for part in parts:
            hooks.append(part.register_forward_pre_hook(before, with_kwargs=True))
            if calls is not None:
                hooks.append(part.register_forward_hook(after, always_call=True))
        check = GenerationCheck.install(model, found)
    except BaseException:  # an interrupt, too: the model is left as it was found
        for each in hooks:
            each.remove()
        route.close()
        raise

    def remove() -> None:
        for each in hooks:
            each.remove()
        if (model := owner()) is not None:  # a cache may outlive its model, whose entry went with it
            _ATTACHED.pop(model, None)
            if check is not None:
                check.remove(model)

    checkpointed = weakref.WeakSet(part for part in model.modules() if hasattr(part, "gradient_checkpointing"))
    return Attachment(route, remove, checkpointed, found, calls=calls)
