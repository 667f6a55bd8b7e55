"""Hooks on the forward calls of an attached model: which cache a call gets, and whether it can go on from its own."""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache

from ...artifacts import KvcalError
from .arguments import Arguments
from .implementations import LOCK
from .layer import Call
from .routing import kind

if TYPE_CHECKING:
    from .attachment import Attachment
    from .entering import Entry


NOTHING = (getattr, (contextlib.nullcontext(), "__exit__"))
"""What `__reduce__` puts in the place of our hooks, as copies and pickles of a model are plain models: a callable of
Python's own that takes a hook's arguments and returns None, so that a pickle needs nothing of ours."""


class InFlight:
    """Calls of a model that have begun and not ended: their masks are those of the attention they began with."""

    def __init__(self) -> None:
        self._parts: set[tuple[int, int]] = set()
        """(thread, id of the module that was called)."""

    def begin(self, module: nn.Module) -> None:
        with LOCK:
            self._parts.add((threading.get_ident(), id(module)))

    def end(self, module: nn.Module) -> None:
        with LOCK:
            self._parts.discard((threading.get_ident(), id(module)))

    def forget_own(self) -> None:
        """Forget the calls of this thread: one that Ctrl-C interrupted has ended without calling `end`."""
        thread = threading.get_ident()
        with LOCK:
            self._parts = {part for part in self._parts if part[0] != thread}

    def __bool__(self) -> bool:
        return bool(self._parts)


class After:
    """A forward hook that marks a call as ended, after an exception, too."""

    def __init__(self, attached: Callable[[], Attachment | None]):
        self._attached = attached

    def __reduce__(self) -> Any:
        return NOTHING

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if (attachment := self._attached()) is not None and attachment.calls is not None:
            attachment.calls.end(module)
            attachment.close_unused()


class Before:
    """A pre-hook that gives our cache to calls that would begin an empty one."""

    def __init__(self, attached: Callable[[], Attachment | None], owner: weakref.ref[Any], parts: weakref.WeakSet[Any]):
        self._attached, self._owner, self._parts = attached, owner, parts

    def __reduce__(self) -> Any:
        return NOTHING

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        model: Any = self._owner()
        if (attachment := self._attached()) is None:  # the last cache was collected as this call began
            return None
        if attachment.calls is not None:
            attachment.calls.begin(module)
        given = Arguments.of(module, args, kwargs)
        past = given.get("past_key_values")
        if isinstance(getattr(past, "call", None), Call):
            _check(model, attachment, module in self._parts)
            _continue(model, module, given)
            return None
        if module not in self._parts or not _begins(model, attachment, given):
            return None
        assert attachment.compressed is not None
        _check(model, attachment, True)
        args, kwargs = given.replaced(past_key_values=_begin(model, attachment.compressed.begin, given), use_cache=True)
        return args, kwargs


def _check(model: Any, attachment: Attachment, of_model: bool) -> None:
    """Raises KvcalError where a call would ignore its compressed cache.

    Args:
        of_model: whether the module called is the model or its backbone, and not a replica of them.
    """
    if not of_model:
        raise KvcalError("past_key_values is a compressed cache, and this is a replica of its model: call the model")
    if (chosen := attachment.route.replaced_by()) is not None:
        raise KvcalError(
            f"the attention implementation of this model was set to {chosen} while it was compressed or had compressed "
            "caches: set it before, and begin with a new cache"
        )
    if any(part.training and part.gradient_checkpointing for part in attachment.checkpointed):
        raise KvcalError(
            f"{kind(model)}: a model that trains with gradient checkpointing leaves out its cache: call model.eval(), "
            "or gradient_checkpointing_disable()"
        )


def _begins(model: Any, attachment: Attachment, given: Arguments) -> bool:
    """Whether a call without a compressed cache is to get one."""
    asked, wanted = attachment.compressed, given.get("use_cache")
    if asked is None or not given.known:  # the backbone gets by name what the model's hook cannot name
        return False
    if not asked.entry.includes_caller():
        _warn_outside(asked.entry)
        return False
    uses = getattr(model.config.get_text_config(), "use_cache", True) if wanted is None else wanted
    # A training step makes a cache that nobody reads.
    return uses and not (model.training and torch.is_grad_enabled())


def _warn_outside(entry: Entry) -> None:
    if not entry.warned:
        entry.warned = True
        warnings.warn(
            f"kvcal: a call outside the thread or task that entered compress() ({entry.thread.name}) is not "
            "compressed: enter there, or give it a CompressedCache",
            stacklevel=2,
        )


def _continue(model: Any, module: nn.Module, given: Arguments) -> None:
    """Check a call that was given a compressed cache, and tell that cache what is coming."""
    past = given.get("past_key_values")
    if past.call.model() is not model:
        raise KvcalError("past_key_values is a compressed cache of another model: make one for this model")
    past.check_sharing(model)
    past.check_whole()
    past.check_rotation(given.get("position_ids"), _lengths(given)[0])
    if module is model:
        past.call.expect(*_lengths(given))


def _begin(model: Any, begin: Callable[[], Any], given: Arguments) -> Any:
    """A compressed cache for a call that has none, or has an empty one of transformers'."""
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
    """(new tokens of a call, of how many of the last it wants logits; None: of all)."""
    inputs = given.get("input_ids")
    inputs = given.get("inputs_embeds") if inputs is None else inputs
    logits = given.get("logits_to_keep")
    return 0 if inputs is None else inputs.shape[1], logits if type(logits) is int and logits > 0 else None
