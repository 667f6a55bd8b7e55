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
    from ..cla.sharing import Sharing


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
    """None: no `compress` is in force, and only calls that are given a compressed cache use one."""
    calls: InFlight | None = None
    """Calls that have not ended. None: nobody waits for them, as the model's own attention takes the same masks."""
    _closed: bool = False

    def release(self) -> None:
        with LOCK:
            self.users -= 1
            self.close_unused()

    def close_unused(self) -> None:
        """Leave the model as it was found, once there are no users and no calls in flight."""
        with LOCK:
            if self.users == 0 and not self.calls and not self._closed:
                self._closed = True
                self.remove()
                self.route.close()

    def take_compressed(self) -> Compressed | None:
        """Forget what `compress` asked of the model's calls, and return it."""
        with LOCK:
            compressed, self.compressed = self.compressed, None
        return compressed


_ATTACHED: weakref.WeakKeyDictionary[Any, Attachment] = weakref.WeakKeyDictionary()


def attached(model: Any) -> Attachment | None:
    return _ATTACHED.get(model)


def attach(model: Any) -> Attachment:
    with LOCK:
        attachment = _ATTACHED.get(model)
        if attachment is None:
            refuse_captured(model)
            attention_layers(model)  # refuses what cannot be attached to
            attachment = _ATTACHED[model] = _attach(model)
        attachment.route.renew()
        attachment.users += 1
        return attachment


def _attach(model: Any) -> Attachment:
    owner = weakref.ref(model)

    def now() -> Attachment | None:
        return None if (model := owner()) is None else _ATTACHED.get(model)

    own_attention, model_rotations = implementation(model), rotations(model)
    route = Route(model, attached_name).open()
    # The backbone too: it may be called by itself.
    parts = weakref.WeakSet((model, backbone(model)))
    before, after = Before(now, owner, parts), After(now)
    calls = InFlight() if own_attention != "sdpa" else None
    hooks: list[Any] = []
    try:
        for part in parts:
            hooks.append(part.register_forward_pre_hook(before, with_kwargs=True))
            if calls is not None:
                hooks.append(part.register_forward_hook(after, always_call=True))
        check = GenerationCheck.install(model, model_rotations)
    except BaseException:  # an interrupt, too: the model is left as it was found
        for hook in hooks:
            hook.remove()
        route.close()
        raise

    def remove() -> None:
        for hook in hooks:
            hook.remove()
        if (model := owner()) is not None:  # a cache may outlive its model, whose entry went with it
            _ATTACHED.pop(model, None)
            if check is not None:
                check.remove(model)

    checkpointed = weakref.WeakSet(part for part in model.modules() if hasattr(part, "gradient_checkpointing"))
    return Attachment(route, remove, checkpointed, model_rotations, calls=calls)
