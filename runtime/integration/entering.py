"""Who is inside `compress()`: the thread and asyncio task that entered it, and what inherits their context."""

from __future__ import annotations

import asyncio
import threading
import weakref
from contextvars import ContextVar
from typing import Any

from ...artifacts import KvcalError
from .implementations import LOCK

_ENTERED: ContextVar[frozenset[Entry]] = ContextVar("kvcal_entered", default=frozenset())
"""Tasks that are started inside get a copy of it, and so does `asyncio.to_thread`; a plain thread does not."""


class Entry:
    """One entering of `compress()`, or call of `enable()`."""

    def __init__(self) -> None:
        self.thread, self._task = threading.current_thread(), _task()
        self.warned = False
        _ENTERED.set(_ENTERED.get() | {self})

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """None: a copy of a model is not reserved for any thread."""

    def __reduce__(self) -> Any:
        return type(None), ()

    def includes_caller(self) -> bool:
        # Not every caller in the same thread and task has the same context, e.g. the cells of a notebook.
        here = (threading.current_thread(), _task())
        return self in _ENTERED.get() or here == (self.thread, self._task)

    def leave(self) -> None:
        _ENTERED.set(_ENTERED.get() - {self})


_ENTRIES: weakref.WeakKeyDictionary[Any, Entry] = weakref.WeakKeyDictionary()


def enter(model: Any) -> Entry:
    """Reserve a model for the caller, before anything is done to it.

    Raises:
        KvcalError: it is compressed already.
    """
    with LOCK:
        holder = _ENTRIES.get(model)
        if holder is None:
            entry = _ENTRIES[model] = Entry()
            return entry
    where = "" if holder.includes_caller() else f" in {holder.thread.name} or a task of it"
    raise KvcalError(
        f"this model is already compressed{where}: leave the other compress(), or call disable() first; a "
        "CompressedCache for each call works in any thread"
    )


def leave(model: Any, entry: Entry) -> None:
    entry.leave()
    with LOCK:
        if _ENTRIES.get(model) is entry:
            del _ENTRIES[model]


def _task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:  # no event loop runs here
        return None
