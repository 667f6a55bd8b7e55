"""What is attached to a model while it is compressed or has compressed caches: our attention, and pre-hooks."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache

from ...artifacts import KvcalError
from .arguments import Arguments
from .attending import ATTACHED
from .entering import Entry
from .generation import LengthCheck
from .implementations import LOCK, Route
from .layer import Call
from .rotation import Rotation, rotations
from .routing import backbone, find_attention, kind, refuse_unsupported

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

    def release(self) -> None:
        with LOCK:
            self.users -= 1
            if self.users == 0:
                self.remove()
                self.route.close()

    def take_compressed(self) -> Compressed | None:
        """What was asked of the model's calls, and no longer is."""
        with LOCK:
            found, self.compressed = self.compressed, None
        return found


_ATTACHED: weakref.WeakKeyDictionary[Any, Attachment] = weakref.WeakKeyDictionary()
_THROUGH_THE_INTERFACE: weakref.WeakSet[Any] = weakref.WeakSet()


def attached(model: Any) -> Attachment | None:
    return _ATTACHED.get(model)


def attach(model: Any) -> Attachment:
    with LOCK:
        found = _ATTACHED.get(model)
        if found is None:
            refuse_unsupported(model)
            if model not in _THROUGH_THE_INTERFACE:
                find_attention(model)  # refuses those that are not
                _THROUGH_THE_INTERFACE.add(model)
            found = _ATTACHED[model] = _attach(model)
        found.route.renew()
        found.users += 1
        return found


def _attach(model: Any) -> Attachment:
    owner = weakref.ref(model)
    route = Route(model, ATTACHED).open()
    # The backbone too: it may be called by itself.
    parts = weakref.WeakSet((model, backbone(model)))
    hook = _Hook(owner, parts)
    hooks: list[Any] = [part.register_forward_pre_hook(hook, with_kwargs=True) for part in parts]
    found = rotations(model)
    check = LengthCheck.install(model, found)

    def remove() -> None:
        for each in hooks:
            each.remove()
        if (model := owner()) is not None:  # a cache may outlive its model, whose entry went with it
            _ATTACHED.pop(model, None)
            if check is not None:
                check.remove(model)

    checkpointed = weakref.WeakSet(part for part in model.modules() if hasattr(part, "gradient_checkpointing"))
    return Attachment(route, remove, checkpointed, found)


class _Hook:
    """A pre-hook that gives our cache to calls that would begin an empty one."""

    def __init__(self, owner: weakref.ref[Any], parts: weakref.WeakSet[nn.Module]):
        self._owner, self._parts = owner, parts

    def __reduce__(self) -> Any:
        """Copies and pickles of the model are plain models: there it is a callable that does nothing, of Python's."""
        return getattr, (contextlib.nullcontext(), "__exit__")

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        model: Any = self._owner()
        found = None if model is None else _ATTACHED.get(model)
        if found is None:  # the last cache was collected as this call began
            return None
        given = Arguments.of(module, args, kwargs)
        past = given.get("past_key_values")
        if isinstance(getattr(past, "call", None), Call):
            _check(model, found, module in self._parts)
            _continue(model, module, given)
            return None
        if module not in self._parts or not _begins(model, found, given):
            return None
        assert found.compressed is not None
        _check(model, found, True)
        args, kwargs = given.replaced(past_key_values=_begin(model, found.compressed.begin, given), use_cache=True)
        return args, kwargs


def _check(model: Any, found: Attachment, ours: bool) -> None:
    """Raises KvcalError where a call would leave its compressed cache aside."""
    if not ours:
        raise KvcalError("past_key_values is a compressed cache, and this is a replica of its model: call the model")
    if (other := found.route.replaced_by()) is not None:
        raise KvcalError(
            f"the attention implementation of this model was set to {other} while it was compressed or had compressed "
            "caches: set it before, and begin with a new cache"
        )
    if any(part.training and part.gradient_checkpointing for part in found.checkpointed):
        raise KvcalError(
            f"{kind(model)}: a model that trains with gradient checkpointing leaves out its cache: call model.eval(), "
            "or gradient_checkpointing_disable()"
        )


def _begins(model: Any, found: Attachment, given: Arguments) -> bool:
    """Whether a call without a cache of ours is to get one."""
    asked, wanted = found.compressed, given.get("use_cache")
    if asked is None or not given.known:  # the backbone's hook sees by name what the model's cannot tell
        return False
    if not asked.entry.includes_caller():
        _outside(asked)
        return False
    uses = getattr(model.config.get_text_config(), "use_cache", True) if wanted is None else wanted
    # A training step makes a cache that nobody reads.
    return uses and not (model.training and torch.is_grad_enabled())


def _outside(asked: Compressed) -> None:
    """A call of another thread or task than the one that entered `compress`, which gets what the model is."""
    if asked.sharing is not None and asked.sharing.map.shared:
        raise KvcalError(
            f"layers of this model share keys and values since {asked.entry.thread.name} entered compress(): wait "
            "until it has left, or use a copy of the model"
        )
    if not asked.entry.warned:
        asked.entry.warned = True
        warnings.warn(
            f"kvcal: a call outside the thread or task that entered compress() ({asked.entry.thread.name}) is not "
            "compressed: enter there, or give it a CompressedCache",
            stacklevel=2,
        )


def _continue(model: Any, module: nn.Module, given: Arguments) -> None:
    """A call with a cache of ours."""
    past = given.get("past_key_values")
    if past.call.model() is not model:
        raise KvcalError("past_key_values is a compressed cache of another model: make one for this model")
    past.check_sharing(model)
    past.check_whole()
    past.check_rotation(given.get("position_ids"), _lengths(given)[0])
    if module is model:
        past.call.expect(*_lengths(given))


def _begin(model: Any, begin: Callable[[], Any], given: Arguments) -> Any:
    """A cache for a call that has none, or an empty one of transformers'."""
    past = given.get("past_key_values")
    if past is not None and (type(past) is not DynamicCache or past.offloading or past.get_seq_length()):
        length = f" of {past.get_seq_length()} tokens" if isinstance(past, Cache) else ""
        raise KvcalError(
            f"inside compress() past_key_values is a {type(past).__name__}{length}: begin with an empty cache, or "
            "with a CompressedCache, and leave cache_implementation out"
        )
    cache = begin()
    # Assisted decoding had told the cache that we replace to record, and asks for the logits of its guesses.
    tokens, logits = _lengths(given)
    cache.check_rotation(given.get("position_ids"), tokens)
    if past is not None and ((logits or 1) > 1 or any(getattr(layer, "record_past", False) for layer in past.layers)):
        cache.activate_past_recording()
        cache.call.expect(tokens, logits)
    return cache


def _lengths(given: Arguments) -> tuple[int, int | None]:
    """(new tokens of a call, of how many it wants logits; None: all)."""
    inputs = given.get("input_ids")
    inputs = given.get("inputs_embeds") if inputs is None else inputs
    logits = given.get("logits_to_keep")
    return 0 if inputs is None else inputs.shape[1], logits if type(logits) is int and logits > 0 else None
